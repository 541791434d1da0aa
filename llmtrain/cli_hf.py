"""`llmtrain export` and `llmtrain import`: to the Hugging Face world and from it."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    to: Annotated[str, typer.Option(metavar="hf", help="The format: hf.")] = "hf",
    step: Annotated[int | None, typer.Option(help="A checkpoint; by default the newest.")] = None,
    dtype: Annotated[str, typer.Option(metavar="fp32|bf16", help="Of the weights.")] = "fp32",
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest weight file, in 10^9 bytes.")] = 2.0,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="The weights and their config alone.")] = False,
) -> None:
    """Write a checkpoint as a folder that Hugging Face's transformers opens."""
    if to != "hf":
        raise typer.BadParameter(f"--to {to}: choose hf")
    if dtype not in ("fp32", "bf16"):
        raise typer.BadParameter(f"--dtype {dtype}: choose fp32 or bf16")
    from llmtrain.checkpoint.hf_export import export_run

    checkpoint, files = export_run(
        run,
        folder,
        step=step,
        dtype=dtype,  # type: ignore[arg-type]
        shard_bytes=int(shard_gb * 1e9),
        with_tokenizer=not no_tokenizer,
    )
    print(f"wrote {folder}: {checkpoint.path} in {dtype}, {len(files)} weight file{'s' * (len(files) > 1)}")


def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and *.safetensors.")],
    into: Annotated[Path, typer.Argument(metavar="INTO", help="A new folder.")],
) -> None:
    """Turn a Hugging Face LLaMA folder into weights that a run can start from."""
    from llmtrain.checkpoint.hf_import import import_folder
    from llmtrain.checkpoint.imported import MODEL_FILE
    from llmtrain.model.size import parameter_count

    model = import_folder(source, into)
    print(f"wrote {into}: {parameter_count(model):,} parameters")
    print(f"start from them with --set run.init_from={into} and the model section of {into / MODEL_FILE}")
