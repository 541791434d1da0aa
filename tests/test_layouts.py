"""A run goes on from every layout to every other: the same bytes of state, samples and rates, the same losses.

A layout is an engine on a number of ranks. Every layout trains one run straight through, with a checkpoint half way;
then every layout loads each of these checkpoints in turn and makes the second half again. On the layout that saved,
that half must be the straight run's byte for byte. On another the order of sums differs, and so may the losses, by what
that costs: 3e-7 was seen in fp32. In bf16 a weight or gradient next to a border may round to the other side, which is
2**-8 of it, but of few of them at a time: 7e-5 was seen.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.store import open_checkpoint
from llmtrain.cli import main
from llmtrain.config import Config
from llmtrain.config_file import load_config
from llmtrain.data import batches
from llmtrain.data.dataset import open_data
from llmtrain.data.order import Consumed, Ids, Order
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.engines.base import EXP_AVG, EXP_AVG_SQ, WEIGHT, FlatState
from llmtrain.schedules import plan
from llmtrain.train.metrics import read_metrics
from tests import ranks
from tests.test_resume import ENGINES, weights
from tests.test_train import command

HALF, END = 10, 20


class Layout(NamedTuple):
    """An engine on so many ranks, with options."""

    engine: str
    ranks: int
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        options = (option.partition(".")[2].replace("=", "_") for option in self.options)
        return "_".join([self.engine, str(self.ranks), *options])

    @property
    def words(self) -> tuple[str, ...]:
        """Its overrides. Six sequences: twice three on one rank, three on each of two, two on each of three."""
        micro = {1: 3, 2: 3, 3: 2}[self.ranks]
        return (*ENGINES[self.engine], f"batch.micro={micro}", *self.options)


class Family(NamedTuple):
    """Layouts whose runs are the same but for rounding."""

    layouts: list[Layout]
    words: tuple[str, ...]
    tolerance: float  # by which rounding may move a loss, relative
    idle: dict[str, str]  # by layout, a parameter of which one of its ranks owns nothing


SHARDED = [engine for engine in ENGINES if engine not in ("single", "zero0")]
EVERY = [Layout("single", 1), *(Layout(engine, count) for engine in SHARDED for count in (1, 2, 3))]

MODEL = (
    "model.num_layers=1",
    "model.num_kv_heads=1",
    "model.vocab_size=353",
    "model.tie_embeddings=true",
    "batch.global_sequences=6",
    "batch.seq_len=16",
    f"checkpoint.every={HALF} steps",
)
# No size divides by three and some not by two. Keys have four rows, of which FSDP2 gives two ranks two each.
ODD = (*MODEL, "model.hidden_size=28", "model.num_heads=7", "model.ffn_size=35")
# ZeRO-3 deals out elements, not rows: only of a norm of four elements does the last of three ranks get none.
NARROW = (*MODEL, "model.hidden_size=4", "model.num_heads=2", "model.ffn_size=7")

WK, NORM = "blocks.0.attention.wk.weight", "norm.weight"
IDLE = {"fsdp_3": WK, "zero1_2": WK, "zero2_3": WK}

FAMILIES = {
    "fp32": Family(EVERY, (*ODD, "engine.precision=fp32"), 1e-5, IDLE),
    "bf16": Family(EVERY, (*ODD, "engine.precision=bf16"), 2**-11, IDLE),
    "narrow": Family(
        [Layout("single", 1), Layout("fsdp", 3), Layout("zero3", 3)],
        (*NARROW, "engine.precision=fp32"),
        1e-5,
        {"fsdp_3": NORM, "zero3_3": NORM},
    ),
}


def recorded_samples() -> list[list[list[int]]]:
    """A list that gets the samples of each update this process reads, (accumulation, micro), from now on."""
    seen: list[list[list[int]]] = []
    real = batches.rank_samples

    def rank_samples(ids: Ids, world_size: int, rank: int, micro: int) -> Ids:
        share = real(ids, world_size, rank, micro)
        seen.append(share.tolist())
        return share

    batches.rank_samples = rank_samples
    return seen


def straight(words: list[str], output: Path) -> None:
    """One rank of a run through the front door; the samples it read go to `output`."""
    seen = recorded_samples()
    try:
        main(words)
    finally:
        (output / f"samples_{os.environ['RANK']}.json").write_text(json.dumps(seen))


def go_on(config: Config, runs: list[Path], output: Path) -> None:
    """One rank that makes the second half of each run in turn, in one engine, and writes what it found."""
    data = open_data(config.data.path)
    schedule = plan(config.schedule, config.batch.tokens, config.optim.betas[1])
    order = Order(data.num_samples(config.batch.seq_len), config.run.seed, data.manifest.content_hash)
    seen = recorded_samples()
    found = {}
    with open_world(60, collectives=config.engine.kind != "single") as world:
        torch.set_float32_matmul_precision("medium")
        engine = build_engine(config, world)
        for run in runs:
            half = open_checkpoint(step_folder(run, HALF))
            engine.load(half.reader, half.state["step"])
            state = engine.state()
            loaded = first_difference(state, step_folder(run, HALF), HALF)
            feed = batches.TrainBatches(
                data,
                order,
                sequences=config.batch.sequences,
                micro=config.batch.micro,
                seq_len=config.batch.seq_len,
                rank=world.rank,
                world_size=world.size,
                since=Consumed(half.state["step"], half.state["samples"]),
            )
            seen.clear()
            steps = [engine.train_step(feed.update(k), schedule(k)) for k in range(HALF + 1, END + 1)]
            found[run.name] = {
                "spans": [[piece.name, piece.start, piece.stop, piece.numel] for piece in state.slices],
                "loaded": loaded,
                "samples": list(seen),
                "lr": [stats.lr for stats in steps],
                "loss": [stats.loss.item() for stats in steps],
                "grad_norm": [stats.grad_norm.item() for stats in steps],
                "trained": first_difference(engine.state(), step_folder(run, END), END),
            }
        (output / f"found_{world.rank}.json").write_text(json.dumps(found))
        world.barrier()


def step_folder(run: Path, update: int) -> Path:
    return run / "checkpoints" / f"step_{update:08d}"


def on_disk(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of a checkpoint, by kind and parameter, put together from its ranks' files without our reader."""
    pieces: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for path in checkpoint.glob("rank_*.safetensors"):
        for key, tensor in load_file(path).items():
            kind, name, start = key.split("/")
            pieces.setdefault((kind, name), {})[int(start)] = tensor
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in pieces.items()}


def first_difference(state: FlatState, checkpoint: Path, update: int) -> str:
    """Where this rank's slices are not, bit for bit, what a checkpoint holds of them; empty where they are."""
    if state.update != update:
        return f"it stands at update {state.update}, not {update}"
    saved = on_disk(checkpoint)
    for piece in state.slices:
        if piece.start < piece.stop and set(piece.tensors) != {WEIGHT, EXP_AVG, EXP_AVG_SQ}:
            return f"{piece.name} has {sorted(piece.tensors)}"
        for kind, tensor in piece.tensors.items():
            here, there = tensor.cpu(), saved[kind, piece.name][piece.start : piece.stop]
            other = (here.view(torch.int32) != there.view(torch.int32)).nonzero().flatten().tolist()
            if other:
                at = other[0]
                return (
                    f"{kind} of {piece.name}[{piece.start + at}] is {here[at]:.9g}, saved as {there[at]:.9g} "
                    f"({len(other)} of {len(here)} elements differ)"
                )
    return ""


class Straight(NamedTuple):
    """What a layout's uninterrupted run did in its second half."""

    run: Path
    names: set[str]
    samples: list[list[int]]
    rows: dict[str, list[float]]


def train_straight(prepared: dict[str, Any], folder: Path, layout: Layout, words: tuple[str, ...]) -> Straight:
    """Train one layout's run from its start to its end, through the front door."""
    run = folder / str(layout)
    output = folder / f"{layout}_straight"
    line = command(prepared, run, *words, *layout.words)
    ranks.start(output, layout.ranks, straight, line, output).succeeded()
    everyone = [json.loads((output / f"samples_{rank}.json").read_text()) for rank in range(layout.ranks)]
    rows = [row for row in read_metrics(run) if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, END + 1))
    assert rows[-1]["loss"] < rows[HALF - 1]["loss"] < rows[0]["loss"], "it learns nothing that could be lost"
    return Straight(
        run,
        open_checkpoint(step_folder(run, HALF)).reader.names(),
        global_batches(everyone)[HALF:],
        {key: [row[key] for row in rows[HALF:]] for key in ("lr", "loss", "grad_norm")},
    )


def global_batches(everyone: list[list[list[list[int]]]]) -> list[list[int]]:
    """The samples of each update over all ranks, in the order in which ranks share them out."""
    return [np.stack(shares, axis=1).ravel().tolist() for shares in zip(*everyone, strict=True)]


def second_halves(
    folder: Path, layout: Layout, words: tuple[str, ...], runs: Iterable[Straight]
) -> list[dict[str, Any]]:
    """What every rank of a layout found when it went on with the runs, by the name of their layout."""
    output = folder / f"{layout}_onward"
    path = folder / f"{layout}.yaml"
    config = load_config(path, [f"run.dir={output}", *words, *layout.words])
    running = ranks.start(output, layout.ranks, go_on, config, [saved.run for saved in runs], output)
    running.wait(timeout=400)  # many runs, and perhaps a busy machine
    running.succeeded()
    return [json.loads((output / f"found_{rank}.json").read_text()) for rank in range(layout.ranks)]


def faults(saved: Straight, found: list[dict[str, Any]], *, exact: bool, tolerance: float) -> list[str]:
    """What is not as it must be where the ranks, which found this, went on with a saved run."""
    told = [f"rank {rank}, loaded: {one['loaded']}" for rank, one in enumerate(found) if one["loaded"]]
    told += gaps(saved.names, [span for one in found for span in one["spans"]])
    samples = global_batches([one["samples"] for one in found])
    told += unlike("samples", samples, saved.samples)
    for rank, one in enumerate(found):
        told += unlike(f"lr on rank {rank}", one["lr"], saved.rows["lr"])
        told += unlike(f"loss of rank {rank} and rank 0", one["loss"], found[0]["loss"])
    if exact:
        told += unlike("loss", found[0]["loss"], saved.rows["loss"])
        told += unlike("grad_norm", found[0]["grad_norm"], saved.rows["grad_norm"])
        told += [f"rank {rank}, trained on: {one['trained']}" for rank, one in enumerate(found) if one["trained"]]
    else:
        told += unlike("loss", found[0]["loss"], saved.rows["loss"], tolerance)
    return told


def unlike(what: str, here: list[Any], there: list[Any], tolerance: float = 0.0) -> list[str]:
    """The first update at which two lists over updates part, relatively by more than `tolerance`."""
    assert len(here) == len(there) == END - HALF
    for k, (one, other) in enumerate(zip(here, there, strict=True), start=HALF + 1):
        if one != other if tolerance == 0 else not abs(one - other) <= tolerance * abs(other):
            return [f"{what} at update {k}: {one}, the straight run has {other}"]
    return []


def gaps(names: set[str], spans: list[list[Any]]) -> list[str]:
    """Parameters that the ranks do not hold once and whole."""
    told = [f"only one side has {name}" for name in sorted(names ^ {span[0] for span in spans})]
    for name in sorted(names):
        held = sorted((start, stop) for other, start, stop, _ in spans if other == name and start < stop)
        numel = {span[3] for span in spans if span[0] == name}
        borders = [0, *(stop for _, stop in held)]
        if [start for start, _ in held] != borders[:-1] or {borders[-1]} != numel:
            told.append(f"{name} of {numel} elements is held as {held}")
    return told


def idle_parameters(found: list[dict[str, Any]]) -> set[str]:
    """Parameters of which some rank owns nothing."""
    spans = [span for one in found for span in next(iter(one.values()))["spans"]]
    return {name for name, start, stop, _ in spans if start == stop}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_from_every_layout_to_every_other(prepared: dict[str, Any], tmp_path: Path, family: str) -> None:
    """A user whose cluster changes would train another model from there on, and one whose does not, too."""
    layouts, words, tolerance, idle = FAMILIES[family]
    runs = {layout: train_straight(prepared, tmp_path, layout, words) for layout in layouts}
    told = []
    for loading in layouts:
        found = second_halves(tmp_path, loading, words, runs.values())
        if str(loading) in idle:
            assert idle[str(loading)] in idle_parameters(found), f"{family}: no rank of {loading} owns too little"
        for saving, saved in runs.items():
            here = [one[saved.run.name] for one in found]
            told += [
                f"{family}: saved by {saving}, loaded by {loading}: {fault}"
                for fault in faults(saved, here, exact=saving == loading, tolerance=tolerance)
            ]
    assert not told, "\n".join(told)


@pytest.mark.parametrize(
    ("engine", "count", "option"),
    [
        ("fsdp", 2, "engine.activation_checkpointing=all"),
        ("zero3", 2, "engine.activation_checkpointing=all"),
        ("single", 1, "engine.compile=true"),
    ],
)
def test_options_of_memory_and_speed_do_not_show_in_a_checkpoint(
    prepared: dict[str, Any], tmp_path: Path, engine: str, count: int, option: str
) -> None:
    """A run could not go on with the option turned on or off, or only from other weights."""
    exact = "compile" not in option  # compiled code sums in another order
    words = (*ODD, "engine.precision=fp32")
    layouts = [Layout(engine, count), Layout(engine, count, (option,))]
    runs = [train_straight(prepared, tmp_path, layout, words) for layout in layouts]
    assert runs[0].names == runs[1].names
    if exact:
        for update in (HALF, END):
            assert weights(runs[0].run, update) == weights(runs[1].run, update)
    told, spans = [], []
    for loading, own in zip(layouts, runs, strict=True):
        found = second_halves(tmp_path, loading, words, runs)
        for saved in runs:
            here = [one[saved.run.name] for one in found]
            spans.append([one["spans"] for one in here])
            told += [
                f"saved by {saved.run.name}, loaded by {loading}: {fault}"
                for fault in faults(saved, here, exact=exact or saved is own, tolerance=1e-5)
            ]
    assert not told, "\n".join(told)
    assert all(one == spans[0] for one in spans)
