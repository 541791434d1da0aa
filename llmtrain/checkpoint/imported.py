"""What is a folder of weights that a run starts from?

It holds `weights.safetensors` (fp32, flat, as a rank's file, without moments), `model.yaml` (the config's `model:`
section), `tokenizer.model` where there is one, and `import.json` with a hash of every parameter. A run whose
`run.init_from` names it starts from these weights, and only from these: they are hashed again, the ranks sharing the
work, and the hash of all is part of the run's trajectory.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import xxhash
import yaml
from torch import Tensor

from llmtrain.checkpoint.files import PIECE, new_folder, progress_bar, write_file, write_json, write_safetensors
from llmtrain.checkpoint.flat import FlatReader
from llmtrain.checkpoint.places import Place
from llmtrain.config import ModelConfig, content_hash
from llmtrain.config_file import parse_yaml, read_section
from llmtrain.data.dataset import TOKENIZER_FILE
from llmtrain.distributed import World
from llmtrain.engines.base import WEIGHT
from llmtrain.errors import CheckpointError
from llmtrain.model.initial import parameter_shapes
from llmtrain.trajectory import IMPORT_FILE, read_import

WEIGHTS_FILE = "weights.safetensors"
MODEL_FILE = "model.yaml"


class ImportedWeights:
    """Update 0 as a source of state: the weights of an imported folder, zero moments."""

    def __init__(self, reader: FlatReader) -> None:
        self.reader = reader

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32."""
        return self.reader.read(name, kind, start, stop) if kind == WEIGHT else torch.zeros(stop - start)


def write_import(
    into: Path, model: ModelConfig, pieces: Callable[[str], Iterator[Tensor]], source: str, tokenizer: Path
) -> None:
    """Write such a folder: `pieces(name)` gives a parameter's elements, flat, in fp32, a piece after another.

    `source` says where they come from. Raises CheckpointError where `into` holds something, or the disk is too small.
    """
    flat: dict[str, tuple[int, ...]] = {
        f"{WEIGHT}/{name}/0": (math.prod(shape),) for name, shape in parameter_shapes(model).items()
    }
    size = 4 * sum(numel for (numel,) in flat.values())
    hashes: dict[str, str] = {}
    with new_folder(into, size) as folder, progress_bar() as progress:
        task = progress.add_task("weights", total=size)

        def hashed(key: str) -> Iterator[Tensor]:
            name, digest = key.split("/")[1], xxhash.xxh3_128()
            for piece in pieces(name):
                digest.update(piece.numpy().data)
                yield piece
                progress.advance(task, piece.nbytes)
            hashes[name] = digest.hexdigest()

        write_safetensors(folder / WEIGHTS_FILE, torch.float32, flat, hashed)
        text = yaml.safe_dump({"model": model.model_dump(mode="json", exclude={"preset"})}, sort_keys=False)
        write_file(folder / MODEL_FILE, text.encode())
        if tokenizer.is_file():
            write_file(folder / TOKENIZER_FILE, tokenizer.read_bytes())
        write_json(folder / IMPORT_FILE, {"source": source, "weights_hash": content_hash(hashes), "weights": hashes})


def open_import(folder: str, model: ModelConfig, world: World) -> ImportedWeights:
    """The weights that `run.init_from` names, for a run of `model`. Collective.

    Raises ConfigError where the folder is none or is another model's, and CheckpointError where it is not whole.
    """
    hashes = read_import(folder)["weights"]
    _require_same_model(folder, model)
    reader = FlatReader(Place(folder), [WEIGHTS_FILE])
    shapes = parameter_shapes(model)
    problem = ""
    for name in list(shapes)[world.rank :: world.size]:
        if not problem and _hash(reader, name, math.prod(shapes[name])) != hashes.get(name):
            problem = f"run.init_from: {folder}/{WEIGHTS_FILE}: {name} is not what was imported: import it anew"
    problem = next((text for text in world.gather_text(problem) if text), "")
    if problem:
        raise CheckpointError(problem)
    return ImportedWeights(reader)


def _hash(reader: FlatReader, name: str, numel: int) -> str:
    digest = xxhash.xxh3_128()
    for start in range(0, numel, PIECE):
        digest.update(reader.read(name, WEIGHT, start, min(numel, start + PIECE)).numpy().data)
    return digest.hexdigest()


def _require_same_model(folder: str, model: ModelConfig) -> None:
    path = Path(folder) / MODEL_FILE
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"run.init_from: cannot read {path}: {error}") from None
    section = values.get("model") if isinstance(values, dict) else None
    there = read_section(ModelConfig, section or {}, str(path)).model_dump(exclude={"preset"})
    here = model.model_dump(exclude={"preset"})
    odd = [
        f"\n  model.{key}: there {there[key]!r}, in this config {here[key]!r}"
        for key in here
        if there[key] != here[key]
    ]
    if odd:
        raise CheckpointError(f"run.init_from: {path} is another model:{''.join(odd)}\nCopy the section from there")
