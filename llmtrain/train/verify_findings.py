"""Where do two legs of a verification part, and by how much?

`a` is the leg that is judged, `b` the straight one. Legs on the same layout must be equal bit for bit. On another
layout sums are taken in another order, so what follows from the first such sum may differ within `BOUNDS`; what was
loaded, the rates and the samples may not.

The bounds are relative. A loss and a gradient norm are sums of very many terms, and differ by a few roundings of fp32
(6e-8 each), or, where the model computes in bf16, by those weights that round to the other side (4e-3 each, averaged).
Weights are measured against the way they went since the resume, moments against themselves, each parameter by its L2
norm: AdamW divides by the gradient's own size, so an element whose gradient is all rounding moves by a whole step.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.checkpoint.files import PIECE
from llmtrain.checkpoint.flat import EMA, FlatReader
from llmtrain.checkpoint.places import Place
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT
from llmtrain.train.rng import METADATA_KEY
from llmtrain.train.verify_leg import STATE_FOLDER, UPDATES_FILE

KINDS = {"weights": (WEIGHT, EMA), "moments": (EXP_AVG, EXP_AVG_SQ)}
RATES = {"learning rate": "lr", "weight decay": "weight_decay"}
SUMS = {"loss": "loss", "gradient norm": "grad_norm"}

BOUNDS = {
    "fp32": {"loss": 1e-5, "gradient norm": 1e-4, "weights": 1e-3, "moments": 1e-3},
    "bf16": {"loss": 1e-3, "gradient norm": 1e-2, "weights": 1e-1, "moments": 1e-1},
}

_Array = npt.NDArray[np.float32]


class Finding(NamedTuple):
    """One component of two legs, compared."""

    component: str
    update: int | None  # the first after which it is not as it must be, or, where it is, differs at all
    first: str  # what was found there; empty where nothing differs
    largest: float  # difference, in `unit`
    unit: str
    bound: float  # 0: exact
    ok: bool


def compare_updates(a: Path, b: Path, updates: range, bounds: dict[str, float]) -> list[Finding]:
    """Rates and samples, then losses and gradient norms within `bounds` (exact where it has none), of two legs."""
    there, here = _rows(b, updates), _rows(a, updates)
    findings = [_numbers(name, key, here, there, 0.0) for name, key in RATES.items()]
    findings.append(_samples(here, there))
    return findings + [_numbers(name, key, here, there, bounds.get(name, 0.0)) for name, key in SUMS.items()]


def compare_states(
    a: Path, b: Path, update: int, when: str, bounds: dict[str, float], since: int | None = None
) -> list[Finding]:
    """Weights and moments as two legs kept them around `update`, then the generators. `when` names the moment.

    Where there are bounds, weights are measured against the way they went after update `since`.
    """
    here, there = _reader(a, update), _reader(b, update)
    findings = []
    for name, kinds in KINDS.items():
        if name in bounds:
            start = None if since is None or name != "weights" else _reader(b, since)
            findings.append(_near(f"{name} {when}", kinds, here, there, start, update, bounds[name]))
        else:
            findings.append(_equal(f"{name} {when}", kinds, here, there, update))
    return [*findings, _generators(f"generators {when}", here, there, update)]


def _rows(leg: Path, updates: range) -> list[list[dict[str, Any]]]:
    """What every rank wrote of each update."""
    ranks = []
    for path in sorted(leg.glob(UPDATES_FILE.replace("{:05d}", "*"))):
        written = {row["update"]: row for row in map(json.loads, path.read_text().splitlines())}
        ranks.append([written[update] for update in updates])
    return [list(rows) for rows in zip(*ranks, strict=True)]


def _numbers(name: str, key: str, here: Sequence[Any], there: Sequence[Any], bound: float) -> Finding:
    """A number that every rank has of every update. NaN equals NaN."""
    first = Finding(name, None, "", 0.0, "relative", bound, True)
    for found, wanted in zip(here, there, strict=True):
        want = wanted[0][key]
        for rank, row in enumerate(found):
            value = row[key]
            if value == want or (value != value and want != want):
                continue
            apart = abs(value - want) / abs(want) if want else float("inf")
            good = apart <= bound
            if first.update is None or (first.ok and not good):
                said = f"{value!r} on rank {rank}, straight {want!r}"
                first = first._replace(update=row["update"], first=said, ok=good)
            first = first._replace(largest=max(first.largest, apart))
    return first


def _samples(here: Sequence[Any], there: Sequence[Any]) -> Finding:
    """The sequences of each global batch, whichever rank was fed which."""
    first = Finding("sample ids", None, "", 0.0, "sequences", 0.0, True)
    for found, wanted in zip(here, there, strict=True):
        one, other = (Counter(digest for row in rows for digest in row["samples"]) for rows in (found, wanted))
        odd = (one - other).total()
        if odd or one != other:
            if first.update is None:
                said = f"{odd} of {one.total()} sequences are not those of the straight run"
                first = first._replace(update=found[0]["update"], first=said, ok=False)
            first = first._replace(largest=max(first.largest, float(odd)))
    return first


def _reader(leg: Path, update: int) -> FlatReader:
    folder = leg / STATE_FOLDER.format(update)
    return FlatReader(Place(folder), sorted(path.name for path in folder.iterdir()))


def _pieces(readers: Sequence[FlatReader], name: str, kind: str) -> Iterator[tuple[int, list[_Array]]]:
    """One flattened tensor of several checkpoints side by side, as (first element, arrays), a piece at a time."""
    numel = readers[0].numel(name, kind)
    for start in range(0, numel, PIECE):
        stop = min(numel, start + PIECE)
        yield start, [reader.read(name, kind, start, stop).numpy() for reader in readers]


def _equal(component: str, kinds: Sequence[str], here: FlatReader, there: FlatReader, update: int) -> Finding:
    first = Finding(component, None, "", 0.0, "absolute", 0.0, True)
    for name in sorted(there.names()):
        for kind in kinds:
            for start, (one, other) in _pieces([there, here], name, kind):
                odd = np.flatnonzero(one.view(np.int32) != other.view(np.int32))
                if not odd.size:
                    continue
                if first.ok:
                    at = odd[0]
                    said = f"{kind} of {name}[{start + at}] is {other[at]:.9g}, straight {one[at]:.9g}"
                    first = first._replace(update=update, first=said, ok=False)
                apart = float(np.abs(other[odd].astype(np.float64) - one[odd]).max())
                first = first._replace(largest=max(first.largest, apart))
    return first


def _near(
    component: str,
    kinds: Sequence[str],
    here: FlatReader,
    there: FlatReader,
    start: FlatReader | None,
    update: int,
    bound: float,
) -> Finding:
    """The L2 norm of the difference, over that of the straight state, or of its way since `start`."""
    worst = Finding(component, None, "", 0.0, "relative", bound, True)
    for name in sorted(there.names()):
        for kind in kinds:
            apart = whole = 0.0
            readers = [there, here] if start is None else [there, here, start]
            for _, (one, other, *before) in _pieces(readers, name, kind):
                wanted = one.astype(np.float64)
                apart += float(np.square(other - wanted).sum())
                whole += float(np.square(wanted - before[0] if before else wanted).sum())
            ratio = float(np.sqrt(apart / whole)) if whole else 0.0 if not apart else float("inf")
            if ratio > worst.largest or ratio != ratio:
                worst = worst._replace(update=update, first=f"{kind} of {name}", largest=ratio, ok=ratio <= bound)
    return worst


def _generators(component: str, here: FlatReader, there: FlatReader, update: int) -> Finding:
    """The generators of the ranks that both legs have."""
    found = Finding(component, None, "", 0.0, "generators", 0.0, True)
    for rank in range(min(len(here.files), len(there.files))):
        mine, wanted = (json.loads(leg.metadata(rank)[METADATA_KEY]) for leg in (here, there))
        odd = [name for name in wanted if mine[name] != wanted[name]]
        if odd and found.ok:
            found = found._replace(update=update, first=f"rank {rank}: {', '.join(odd)}", ok=False)
        found = found._replace(largest=found.largest + len(odd))
    return found
