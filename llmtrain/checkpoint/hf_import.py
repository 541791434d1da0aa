"""How do weights that Hugging Face's users publish become the start of a run?"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.checkpoint.files import PIECE
from llmtrain.checkpoint.hf_model import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, from_hf_config, hf_name
from llmtrain.checkpoint.imported import write_import
from llmtrain.config import ModelConfig
from llmtrain.data.dataset import TOKENIZER_FILE
from llmtrain.errors import CheckpointError
from llmtrain.model.initial import parameter_shapes

_DTYPES = ("F32", "BF16", "F16")  # each of them is exact in fp32


def import_folder(source: Path, into: Path) -> ModelConfig:
    """Write the Hugging Face folder `source` as `into`, a folder that a run starts from.

    Raises CheckpointError where `source` is damaged, is none, or is of a model that the decoder cannot express, and
    where `into` is not empty.
    """
    model = from_hf_config(_read_json(source / CONFIG_FILE), str(source / CONFIG_FILE))
    shapes = parameter_shapes(model)
    files = _files(source)
    _require_shapes(files, shapes, model.tie_embeddings)

    def pieces(name: str) -> Iterator[Tensor]:
        return _pieces(files[hf_name(name)], hf_name(name), shapes[name])

    write_import(into, model, pieces, str(source.resolve()), source / TOKENIZER_FILE)
    return model


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


def _pieces(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor of theirs, flat, in fp32, some rows at a time. The map of the file is given up after each."""
    rows = max(1, PIECE // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        with _opened(path) as file:
            piece: Tensor = file.get_slice(name)[start : start + rows].to(torch.float32).flatten()
        yield piece
