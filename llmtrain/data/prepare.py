"""How does text become a folder of tokens? Sample, train the tokenizer, tokenize unit by unit, join, seal.

The folder, in the order it is written:

    .units/settings.json     what is being prepared; a folder begun with other settings is refused
    tokenizer.model          trained on a sample of the source, or a copy of the given one
    train-000000.bin ...     one shard for each unit of text; beside it, in .units, its validation part and its record
    validation.bin           the parts joined
    token_bytes.npy
    manifest.json            last: a folder that has one is finished. Then .units goes

Every file is written atomically and is a function of the source and the settings alone: neither the number of workers
nor a kill at any moment changes a byte. A later call continues after the finished units.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from llmtrain.config import DataConfig, GivenTokenizer, content_hash
from llmtrain.data.dataset import TOKEN_BYTES_FILE, TOKENIZER_FILE, open_data
from llmtrain.data.manifest import FILE, PREPARE_COMMAND, Manifest, load_manifest, require_fits
from llmtrain.data.progress import PrepareProgress, note
from llmtrain.data.seal import VALIDATION_FILE, seal
from llmtrain.data.shards import atomic_file
from llmtrain.data.sources import documents, fingerprint, source_size
from llmtrain.data.tokenizer import (
    Tokenizer,
    available_ram,
    estimated_ram,
    sample_documents,
    train_tokenizer,
)
from llmtrain.data.unit import UNITS_FOLDER, UnitPlace, UnitRecord, finished_unit
from llmtrain.data.workers import unit_pool
from llmtrain.device import usable_cores
from llmtrain.errors import DataError

_SETTINGS_FILE = "settings.json"
_LOCK_FILE = "lock"


def prepare(
    config: DataConfig,
    *,
    workers: int | None = None,
    model_vocab_size: int,
    seed: int = 1234,
    force: bool = False,
    command: str = PREPARE_COMMAND,
) -> Manifest:
    """Prepare `config.path`, continue what was begun there, or find it finished. Raises DataError.

    `seed` decides which documents the tokenizer is trained on and nothing else. `workers` counts processes, by default
    one for each core. `force` discards what is there.
    """
    folder = Path(config.path)
    given = None
    if isinstance(config.tokenizer, GivenTokenizer):
        given = Tokenizer.load(config.tokenizer.path)
        require_fits(given.vocab_size, model_vocab_size, f"the tokenizer's ({config.tokenizer.path})")
    else:
        require_fits(config.tokenizer.vocab_size, model_vocab_size, "data.tokenizer's")
    settings = _settings(config, given, seed)
    if not force and (folder / FILE).exists():
        return _finished(config, settings, model_vocab_size, command)
    found = fingerprint(config.source)
    with _only_one(folder):
        if force:
            _discard(folder)
        settings_hash = _begin(folder, {**settings, "source files": found}, command)
        tokenizer = _tokenizer(config, folder, given, seed)
        records = _tokenize(config, folder, tokenizer, settings_hash, workers or usable_cores())
        try:
            manifest = seal(config, folder, tokenizer, records, settings, found)
        except DataError:  # no data can be had with these settings, so they must not stand in the way of others
            _discard(folder)
            raise
        shutil.rmtree(folder / UNITS_FOLDER)
    note(f"prepared {folder}: {manifest.train.tokens:,} train and {manifest.validation.tokens:,} validation tokens")
    return manifest


def _settings(config: DataConfig, given: Tokenizer | None, seed: int) -> dict[str, Any]:
    """Everything that decides the tokens, besides the text itself."""
    tokenizer = config.tokenizer.model_dump(mode="json") | {"sample_seed": seed}
    return {
        "format": 1,
        "source": config.source.model_dump(mode="json"),
        "tokenizer": {"kind": "model", "hash": given.hash} if given else tokenizer,
        "validation_fraction": config.validation_fraction,
        "shard_bytes": config.shard_bytes,
    }


def _finished(config: DataConfig, settings: dict[str, Any], model_vocab_size: int, command: str) -> Manifest:
    manifest = load_manifest(config.path, command)
    _require_same(config.path, manifest.settings, settings, command)
    manifest.require_fits(model_vocab_size)
    open_data(config.path, command)
    shutil.rmtree(Path(config.path) / UNITS_FOLDER, ignore_errors=True)
    note(f"{config.path} is already prepared ({manifest.train.tokens:,} train tokens of {manifest.source})")
    try:
        changed = fingerprint(config.source) != manifest.source_fingerprint
    except DataError:
        changed = False  # the folder was copied here without its source, which it no longer needs
    if changed:
        note(f"the files of {manifest.source} have changed since; to prepare them anew: {command} --force")
    return manifest


def _begin(folder: Path, settings: dict[str, Any], command: str) -> str:
    """Write down what is prepared here, or compare with what was begun. The hash that finished units must carry."""
    units = folder / UNITS_FOLDER
    file = units / _SETTINGS_FILE
    if file.exists() and any(units.glob("[0-9]*.json")):
        _require_same(folder, json.loads(file.read_text()), settings, command)
    elif not file.exists() and (foreign := _written(folder)):
        raise DataError(
            f"{folder} has files of an unknown preparation, {foreign[0].name} among them. "
            f"Use another data.path, or discard them with: {command} --force"
        )
    elif not file.exists() or json.loads(file.read_text()) != settings:
        _discard(folder)
        with atomic_file(file) as out:
            out.write(json.dumps(settings, indent=1).encode())
    for stale in [*folder.glob(".*.tmp"), *units.glob(".*.tmp")]:
        stale.unlink()
    return content_hash(settings)


def _require_same(folder: Path | str, there: dict[str, Any], wanted: dict[str, Any], command: str) -> None:
    old, new = _flat(there), _flat(wanted)
    differing = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise DataError(
            f"{folder} was prepared or begun with other settings ({'; '.join(differing)}). "
            f"Use another data.path, or discard it with: {command} --force"
        )


def _flat(values: dict[str, Any], prefix: str = "data.") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder, so that a second preparation is told instead of writing into the first."""
    try:
        (folder / UNITS_FOLDER).mkdir(parents=True, exist_ok=True)
        with (folder / UNITS_FOLDER / _LOCK_FILE).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{folder} is being prepared by another process: wait for it or stop it") from None
            yield
    except OSError as error:
        raise DataError(f"cannot write in data.path {folder}: {error.strerror or error}") from error


def _written(folder: Path) -> list[Path]:
    """What a preparation leaves in its folder."""
    patterns = (FILE, "train-*.bin", VALIDATION_FILE, TOKEN_BYTES_FILE, TOKENIZER_FILE)
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _discard(folder: Path) -> None:
    for path in [*_written(folder), *(folder / UNITS_FOLDER).iterdir()]:
        if path.name != _LOCK_FILE:
            path.unlink()


def _tokenizer(config: DataConfig, folder: Path, given: Tokenizer | None, seed: int) -> Tokenizer:
    """The given tokenizer, the one an earlier call trained, or a new one; then it lies in the folder."""
    file = folder / TOKENIZER_FILE
    if given is None and file.exists():
        return Tokenizer.load(file)
    if given is not None:
        proto = given.proto
    else:
        assert not isinstance(config.tokenizer, GivenTokenizer)
        note(f"reading a sample for the tokenizer from {config.source.kind}")
        texts = sample_documents(documents(config.source), config.tokenizer.sample_bytes, seed, available_ram())
        size = sum(len(text.encode()) for text in texts)
        free = available_ram()
        note(
            f"training a tokenizer of {config.tokenizer.vocab_size} pieces on {size / 1e6:.1f} MB of text: about "
            f"{estimated_ram(size) / 1e9:.1f} GB of memory" + (f", {free / 1e9:.1f} GB available" if free else "")
        )
        proto = train_tokenizer(texts, config.tokenizer)
    with atomic_file(file) as out:
        out.write(proto)
    return Tokenizer(proto, str(file))


def _tokenize(
    config: DataConfig, folder: Path, tokenizer: Tokenizer, settings_hash: str, workers: int
) -> list[UnitRecord]:
    """Bring every unit of the source to its finished record, in order."""

    def place(index: int) -> UnitPlace:
        return UnitPlace(folder, index, settings_hash, tokenizer.proto, config.validation_fraction)

    records: dict[int, UnitRecord] = {}
    kept = 0
    while record := finished_unit(place(kept), tokenizer):
        records[kept] = record
        kept += 1
    texts = documents(config.source, skip=sum(record.read for record in records.values()))
    with PrepareProgress(source_size(config.source)) as progress, unit_pool(workers) as submit:
        for record in records.values():
            progress.advance(record.bytes, record.read, kept=True)
        pending: dict[Future[UnitRecord], int] = {}

        def collect(at_most: int) -> None:
            while len(pending) > at_most:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    index = pending.pop(future)
                    records[index] = future.result()
                    progress.advance(records[index].bytes, records[index].read)

        index = kept
        while True:
            later = finished_unit(place(index), tokenizer)  # a unit finished before the kill, behind one that was not
            if later is not None:
                records[index] = later
                progress.advance(later.bytes, sum(1 for _ in islice(texts, later.read)), kept=True)
            else:
                unit = next_unit(texts, config.shard_bytes)
                if not unit:
                    break
                collect(at_most=workers)
                pending[submit(place(index), unit)] = index
            index += 1
        collect(at_most=0)
    return [records[index] for index in sorted(records)]


def next_unit(texts: Iterator[str], shard_bytes: int) -> list[str]:
    """The next documents until they have `shard_bytes` of text; empty at the end of the source."""
    unit: list[str] = []
    size = 0
    for text in texts:
        unit.append(text)
        size += len(text.encode())
        if size >= shard_bytes:
            break
    return unit
