"""How do published weights become the start of a run?

`llmtrain import` turns a Hugging Face LLaMA folder into one of ours: `weights.safetensors` (fp32, flat, as a rank's
file, without moments), `model.yaml` (the config's `model:` section), `tokenizer.model` where there is one, and
`import.json` with a hash of every parameter. A run whose `run.init_from` names it starts from these weights, and only
from these: they are hashed again, the ranks sharing the work, and the hash of all is part of the run's trajectory.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.checkpoint.files import PIECE, new_folder, progress_bar, write_file, write_json, write_safetensors
from llmtrain.checkpoint.flat import FlatReader
from llmtrain.checkpoint.hf_model import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, from_hf_config, hf_name
from llmtrain.checkpoint.places import Place
from llmtrain.config import IMPORT_FILE, ModelConfig, content_hash, read_import
from llmtrain.config_file import parse_yaml, read_section
from llmtrain.data.dataset import TOKENIZER_FILE
from llmtrain.distributed import World
from llmtrain.engines.base import WEIGHT
from llmtrain.errors import CheckpointError
from llmtrain.model.initial import parameter_shapes

WEIGHTS_FILE = "weights.safetensors"
MODEL_FILE = "model.yaml"

_DTYPES = ("F32", "BF16", "F16")  # each of them is exact in fp32


class ImportedWeights:
    """Update 0 as a source of state: the weights of an imported folder, zero moments."""

    def __init__(self, reader: FlatReader) -> None:
        self.reader = reader

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of one flattened tensor, 1-D fp32."""
        return self.reader.read(name, kind, start, stop) if kind == WEIGHT else torch.zeros(stop - start)


def import_folder(source: Path, into: Path) -> ModelConfig:
    """Write the Hugging Face folder `source` as `into`. Raises CheckpointError where it is damaged, is none, or is of a
    model that the decoder cannot express, and where `into` is not empty."""
    model = from_hf_config(_read_json(source / CONFIG_FILE), str(source / CONFIG_FILE))
    shapes = parameter_shapes(model)
    files = _files(source)
    _require_shapes(files, shapes, model.tie_embeddings)
    with new_folder(into, 4 * sum(math.prod(shape) for shape in shapes.values())) as temporary:
        hashes = _write_weights(files, shapes, temporary)
        text = yaml.safe_dump({"model": model.model_dump(mode="json", exclude={"preset"})}, sort_keys=False)
        write_file(temporary / MODEL_FILE, text.encode())
        if (source / TOKENIZER_FILE).is_file():
            write_file(temporary / TOKENIZER_FILE, (source / TOKENIZER_FILE).read_bytes())
        imported = {"source": str(source.resolve()), "weights_hash": content_hash(hashes), "weights": hashes}
        write_json(temporary / IMPORT_FILE, imported)
    return model


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; it is no Hugging Face model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def _files(source: Path) -> dict[str, Path]:
    """Their name of each tensor of the folder, and the file that holds it."""
    if (source / INDEX_FILE).is_file():
        listed = _read_json(source / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{source / INDEX_FILE} has no weight_map")
        return {name: source / str(file) for name, file in listed.items()}
    single = source / SINGLE_FILE
    if not single.is_file():
        raise CheckpointError(f"{source} has neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors are read")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None


def _require_shapes(files: dict[str, Path], shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Raise CheckpointError where the folder's tensors are not those of the model, by name, shape and type."""
    wanted = {hf_name(name): shape for name, shape in shapes.items()}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (it has no __iter__)
                entry = file.get_slice(name)
                found[name] = (tuple(entry.get_shape()), entry.get_dtype())
    for name, shape in wanted.items():
        if name not in files or name not in found:
            raise CheckpointError(f"{name} is missing" + (f" from {files[name]}" if name in files else ""))
        if found[name][0] != shape:
            raise CheckpointError(f"{files[name]}: {name} has shape {found[name][0]}, the config wants {shape}")
        if found[name][1] not in _DTYPES:
            raise CheckpointError(f"{files[name]}: {name} is {found[name][1]}, only {', '.join(_DTYPES)} are read")
    # Old folders store RoPE's frequencies; a tied head that is stored all the same is the embedding again.
    unused = {name for name in found if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    odd = sorted(found.keys() - wanted.keys() - unused)
    if odd:
        raise CheckpointError(f"{odd[0]} has no place in llmtrain's decoder ({len(odd)} such tensors)")


def _write_weights(files: dict[str, Path], shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, str]:
    """Write the weights file, and return each parameter's hash."""
    flat: dict[str, tuple[int, ...]] = {f"{WEIGHT}/{name}/0": (math.prod(shape),) for name, shape in shapes.items()}
    hashes: dict[str, str] = {}
    with progress_bar() as progress:
        task = progress.add_task("importing", total=4 * sum(math.prod(shape) for shape in shapes.values()))

        def pieces(key: str) -> Iterator[Tensor]:
            name = key.split("/")[1]
            digest = xxhash.xxh3_128()
            for piece in _pieces(files[hf_name(name)], hf_name(name), shapes[name]):
                digest.update(piece.numpy().data)
                yield piece
                progress.advance(task, piece.nbytes)
            hashes[name] = digest.hexdigest()

        write_safetensors(folder / WEIGHTS_FILE, torch.float32, flat, pieces)
    return hashes


def _pieces(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor of theirs, flat, in fp32, some rows at a time. The map of the file is given up after each."""
    rows = max(1, PIECE // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        with _opened(path) as file:
            piece: Tensor = file.get_slice(name)[start : start + rows].to(torch.float32).flatten()
        yield piece


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
