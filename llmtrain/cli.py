"""The `llmtrain` command: parse, call one function, print. What a command does lives in the rooms below.

Numbers for scripts go to stdout with `--json`, alone; everything else a person reads. A mistake of the user ends with
one message and exit code 2, without a traceback, on one rank only.
"""

import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from llmtrain.cli_average import average, lr_find
from llmtrain.cli_bench import bench
from llmtrain.cli_branch import branch
from llmtrain.cli_checkpoint import checkpoint_app, verify_resume
from llmtrain.cli_compare import compare
from llmtrain.cli_doctor import doctor
from llmtrain.cli_hf import export, import_
from llmtrain.cli_law import law_app
from llmtrain.cli_plan import plan
from llmtrain.cli_schedule import schedule_app
from llmtrain.cli_serve import serve
from llmtrain.cli_slurm import slurm_app
from llmtrain.cli_sweep import sweep
from llmtrain.errors import EnvironmentError, LlmtrainError

TRAIN_PACKAGES = ("torch", "deepspeed", "sentencepiece", "datasets", "wandb", "safetensors", "xxhash", "fsspec")
FIRST_WORD_S = 5.0
_GIVE_WAY_S = 10.0

app = typer.Typer(
    name="llmtrain",
    help="Pretrain LLaMA-style language models; compare learning-rate schedules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(schedule_app, name="schedule")
app.add_typer(law_app, name="law")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(slurm_app, name="slurm")

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="The YAML file that describes the run.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, for example optim.clip=0.5.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Step = Annotated[int | None, typer.Option(help="A checkpoint; by default the newest.")]
Json = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]


@app.command(epilog="Example: llmtrain prepare --config configs/demo_cosine.yaml")
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; the output does not depend on it.")] = None,
    force: Annotated[bool, typer.Option(help="Delete what is in data.path and prepare it anew.")] = False,
) -> None:
    """Train the tokenizer and write the token files that training reads."""
    from llmtrain.config_file import load_config
    from llmtrain.data.prepare import prepare as prepare_data

    loaded = load_config(config, overrides)
    prepare_data(
        loaded.data,
        workers=workers,
        model_vocab_size=loaded.model.vocab_size,
        force=force,
        command=_prepare_command(config, overrides),
    )


@app.command(epilog="Example: llmtrain train --config configs/demo_cosine.yaml --set engine.kind=single")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|must|never|CHECKPOINT",
            help="auto: go on where the run folder has a checkpoint; must; never; or from the one named, by its folder "
            "or as RUN@UPDATE.",
        ),
    ] = "auto",
    schedule_change: Annotated[
        str | None,
        typer.Option(
            metavar="extend|replace",
            help="Go on although the config asks for another schedule or global batch than the checkpoint was trained "
            "on. extend: from the learning rate reached to the new end; replace: the new curve from here on.",
        ),
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Train, or go on training. Also launch/pretrain.py under deepspeed, torchrun or srun."""
    if schedule_change not in (None, "extend", "replace"):
        raise typer.BadParameter(f"--schedule-change {schedule_change}: choose extend or replace")
    from llmtrain.config_file import load_config

    loaded = load_config(config, overrides)
    from llmtrain.train.attempts import recorded, seconds_left
    from llmtrain.train.stop import USER_SIGNALS, StopRequest

    run_dir = Path(loaded.run.dir)
    stop = StopRequest(run_dir, loaded.run.max_minutes, job_left_s=seconds_left(run_dir, os.environ))
    with _imports_stay(), recorded(run_dir), stop.listening(USER_SIGNALS):
        from llmtrain.train.run import train as train_run

        train_run(
            loaded,
            prepare_command=_prepare_command(config, overrides),
            resume=resume,
            change=schedule_change,  # type: ignore[arg-type]
            stop=stop,
        )


@app.command("eval", epilog="Example: llmtrain eval runs/demo_cosine")
def evaluate(run: RunDir, step: Step = None, as_json: Json = False) -> None:
    """Score a checkpoint on the run's validation sets again."""
    from llmtrain.train.saved import evaluate_run

    rows = evaluate_run(run, step)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"step {row['step']}  {row['set']}: loss {row['loss']:.6f}  perplexity {row['perplexity']:.4f}  "
            f"nats/byte {row['nats_per_byte']:.6f}  ({row['num_tokens']:,} tokens)"
        )


@app.command(epilog='Example: llmtrain generate runs/demo_cosine --prompt "def main("')
def generate(
    run: RunDir,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    step: Step = None,
) -> None:
    """Let a checkpoint go on from a prompt."""
    from llmtrain.train.saved import generate as generate_text

    shown = ""
    for text in generate_text(run, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, step=step):
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


app.command("average", epilog="Example: llmtrain average runs/demo_cosine --last 3")(average)
app.command("lr-find", epilog="Example: llmtrain lr-find --config configs/demo_cosine.yaml --png edge.png")(lr_find)
app.command("branch", epilog='Example: llmtrain branch runs/trunk@800 --schedule "cooldown(linear, 20%)" --name cool')(
    branch
)
app.command("compare", epilog="Example: llmtrain compare runs/demo_cosine runs/demo_linear --html report.html")(compare)
app.command("verify-resume", epilog="Example: llmtrain verify-resume --config configs/demo_cosine.yaml")(verify_resume)
app.command("sweep", epilog="Example: llmtrain sweep configs/studies/ablation.yaml")(sweep)
app.command("doctor", epilog="Example: llmtrain doctor --config configs/demo_cosine.yaml")(doctor)
app.command("serve", epilog="Example: llmtrain serve --runs runs")(serve)
app.command("bench", epilog="Example: llmtrain bench --config configs/demo_cosine.yaml")(bench)
app.command("plan", epilog="Example: llmtrain plan --config configs/7b_cosine.yaml --gpus 8 --gpu h100")(plan)
app.command("export", epilog="Example: llmtrain export runs/7b_cosine --to hf exported/7b")(export)
app.command("import", epilog="Example: llmtrain import downloads/llama imported/llama")(import_)


@contextmanager
def _imports_stay() -> Iterator[None]:
    """Put off looking for garbage until `build_engine`: there is none in modules, and to look takes a second of it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _prepare_command(config: Path, overrides: list[str] | None) -> str:
    """The command that prepares the data of a config as it is overridden."""
    extra = "".join(f" --set {shlex.quote(text)}" for text in overrides or [] if text.startswith(("data.", "model.")))
    return f"llmtrain prepare --config {config}{extra}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 a mistake of the user, 3 training diverged."""
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except LlmtrainError as error:
        if _speaks():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    """Run one command. Previews, reports and the service need no torch, so it may not be installed."""
    try:
        app(args=arguments, standalone_mode=True)
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_PACKAGES:
            raise
        raise EnvironmentError(f"{error.name} is not installed: pip install 'llmtrain[train]'") from None


def _speaks() -> bool:
    """Whether this process tells the user. All ranks make the same mistake, so the first tells it, and ends the job;
    another node's first rank is still there after a moment where the mistake is that node's alone. Launchers end all
    ranks when one does, so the others do not end before the first had its say.
    """
    if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0):
        time.sleep(FIRST_WORD_S)
        return False
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        time.sleep(_GIVE_WAY_S)
    return True
