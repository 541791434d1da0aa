"""How does a checkpoint become a folder that `transformers`, vLLM or llama.cpp opens?

Weights are read from the ranks' files range by range and written as they come, so a model of any size is exported in
the memory of one piece (`files`). It needs no engine, no GPU, no `transformers`. bf16 is fp32 rounded to nearest.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmtrain.checkpoint.files import PIECE, new_folder, progress_bar, require_empty, write_json, write_safetensors
from llmtrain.checkpoint.flat import FlatReader
from llmtrain.checkpoint.hf_model import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, hf_name, to_hf_config
from llmtrain.checkpoint.hf_tokenizer import require_expressible, write_tokenizer
from llmtrain.checkpoint.store import Checkpoint, CheckpointStore
from llmtrain.config import ModelConfig
from llmtrain.config_file import checkpoints_of, load_config, read_section
from llmtrain.data.dataset import TOKENIZER_FILE
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.distributed import World
from llmtrain.engines.base import WEIGHT
from llmtrain.errors import CheckpointError, DataError
from llmtrain.model.initial import parameter_shapes

Dtype = Literal["fp32", "bf16"]

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_run(
    run_dir: Path, folder: Path, *, step: int | None, dtype: Dtype, shard_bytes: int, with_tokenizer: bool
) -> tuple[Checkpoint, list[str]]:
    """Export a run's newest whole checkpoint, or that of `step`. Returns it, and the weights' file names."""
    require_empty(folder)
    store = CheckpointStore(checkpoints_of(run_dir), World(0, 1, 0, torch.device("cpu")), keep=2)
    tokenizer = Path(load_config(run_dir / "config.yaml").data.path) / TOKENIZER_FILE if with_tokenizer else None
    found, rejected = store.pick(step)
    for text in rejected:
        print(f"rejected {text}", file=sys.stderr)
    return found, export_checkpoint(found, folder, tokenizer=tokenizer, dtype=dtype, shard_bytes=shard_bytes)


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    tokenizer: Path | None,
    dtype: Dtype,
    shard_bytes: int,
) -> list[str]:
    """Write `folder`: weights, configs and, where its file is given, the tokenizer. Returns the weights' file names.

    A tensor larger than `shard_bytes` has a file of its own. Raises CheckpointError where `folder` is not empty or the
    checkpoint is not whole, and DataError where the tokenizer is not the run's, or cannot be expressed.
    """
    model = read_section(ModelConfig, checkpoint.state["trajectory"]["model"], f"{checkpoint.path}/state.json")
    vocabulary = None if tokenizer is None else _tokenizer(tokenizer, checkpoint.state["compare"]["tokenizer_hash"])
    shapes = parameter_shapes(model)
    _require_held(checkpoint, set(shapes))
    kept = _TORCH[dtype]
    shards = _shards({name: math.prod(shape) * kept.itemsize for name, shape in shapes.items()}, shard_bytes)
    size = sum(math.prod(shape) for shape in shapes.values()) * kept.itemsize
    with new_folder(folder, size) as temporary:
        files = _write_weights(checkpoint.reader, temporary, kept, shapes, shards)
        _write_configs(temporary, model, str(kept).removeprefix("torch."), vocabulary)
        if vocabulary is not None:
            write_tokenizer(vocabulary, model.max_seq_len, temporary)
    return files


def _tokenizer(path: Path, wanted: str) -> Tokenizer:
    remedy = "put the run's prepared data back, or export the weights alone with --no-tokenizer"
    try:
        tokenizer = Tokenizer.load(path)
    except DataError as error:
        raise DataError(f"{error}: {remedy}") from None
    if tokenizer.hash != wanted:
        raise DataError(
            f"tokenizer {path} has hash {tokenizer.hash}, the checkpoint was trained with {wanted}: {remedy}"
        )
    require_expressible(tokenizer, str(path))
    return tokenizer


def _require_held(checkpoint: Checkpoint, wanted: set[str]) -> None:
    """Raise where the files hold other parameters than the model has."""
    odd = sorted(wanted ^ checkpoint.reader.names())
    if odd:
        what = "does not hold" if odd[0] in wanted else "holds, unlike its model,"
        raise CheckpointError(f"{checkpoint.path} {what} {odd[0]}: its files and its state.json do not belong together")


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in their order, cut into groups of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_weights(
    reader: FlatReader, folder: Path, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]], shards: list[list[str]]
) -> list[str]:
    ours = {hf_name(name): name for name in shapes}
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    where: dict[str, str] = {}
    with progress_bar() as progress:
        task = progress.add_task("exporting", total=total)

        def pieces(name: str) -> Iterator[Tensor]:
            numel = math.prod(shapes[ours[name]])
            for start in range(0, numel, PIECE):
                stop = min(numel, start + PIECE)
                yield reader.read(ours[name], WEIGHT, start, stop)
                progress.advance(task, (stop - start) * dtype.itemsize)

        for number, names in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / file, dtype, {hf_name(name): shapes[name] for name in names}, pieces)
            where |= {hf_name(name): file for name in names}
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    return sorted(set(where.values()))


def _write_configs(folder: Path, model: ModelConfig, dtype: str, tokenizer: Tokenizer | None) -> None:
    eos_id = None if tokenizer is None else tokenizer.eos_id
    write_json(folder / CONFIG_FILE, to_hf_config(model, dtype, eos_id))
    generation: dict[str, Any] = {}
    if tokenizer is not None:
        generation = {"bos_token_id": eos_id, "eos_token_id": eos_id}
        if tokenizer.vocab_size < model.vocab_size:  # ids that no text has, as `llmtrain generate` leaves them out
            generation["suppress_tokens"] = list(range(tokenizer.vocab_size, model.vocab_size))
    write_json(folder / "generation_config.json", generation)
