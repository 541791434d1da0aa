"""May a saved run go on as the config now asks, and then with which learning rates on which batches?

What shaped the loss at a given learning rate, the trajectory, must be the same. The schedule and the global batch may
change, where the user says how:

- `extend`: the new schedule, laid from the learning rate reached to its floor at the new horizon.
- `replace`: the new schedule, whole, from the next update on. A branch always does this.

A changed global batch is a change of the schedule where the horizon is in tokens: either mode accepts it, and a curve
that is otherwise the same stays as it is over tokens. Where the horizon is in steps it bends the curve over tokens, so
only `replace` accepts it. Either way the data goes on with the next sample: segments of (updates before it, samples
consumed by them, sequences of each of its updates) say which batches a run was trained on.
"""

from typing import Any, Literal, NamedTuple

from llmtrain.checkpoint.inspect import differences
from llmtrain.config import Config
from llmtrain.data.order import Consumed
from llmtrain.errors import CheckpointError, ScheduleError
from llmtrain.schedules import Schedule, both_sides, continues, extend, refusal, replace
from llmtrain.trajectory import trajectory_of

ScheduleChange = Literal["extend", "replace"]
Mode = Literal["extend", "replace", "branch"]
Segments = list[list[int]]


class Joined(NamedTuple):
    """How a saved run goes on."""

    schedule: Schedule  # of the whole run: what the checkpoint was trained on, then what comes
    segments: Segments
    said: list[str]  # what was joined, for the banner; empty where nothing changed


def join(
    config: Config, state: dict[str, Any], data_hash: str, configured: Schedule, mode: Mode | None, where: str
) -> Joined:
    """How the checkpoint `where` with this state.json goes on. Raises CheckpointError or ScheduleError where not."""
    require_same_trajectory(state["trajectory"], trajectory_of(config, data_hash), where, but="batch.sequences")
    at, segments = state["step"], state["trajectory"]["batch_segments"]
    sequences = segments[-1][2]
    rebatched = sequences != config.batch.sequences
    if rebatched:
        segments = [*segments, [at, state["samples"], config.batch.sequences]]
    saved = Schedule.from_spec(state["schedule"])
    configured = configured.over(clock(segments, config.batch.seq_len))
    onward = saved.with_batch(at, config.batch.tokens) if rebatched else saved
    same_curve = continues(onward, configured) and onward.lr(at) == saved.lr(at)
    if same_curve and not rebatched:
        return Joined(saved, segments, [])
    in_tokens = config.schedule.horizon.unit == "tokens"
    if mode is None or (rebatched and mode == "extend" and not in_tokens):
        raise ScheduleError(f"{where}: {_refused(config, saved, configured, at, sequences)}")
    if not same_curve:
        onward = (extend if mode == "extend" else replace)(saved, at, configured)
    return Joined(onward, segments, _said(config, mode, saved, configured, onward, at, sequences))


def last_update(config: Config, schedule: Schedule, since: Consumed) -> int:
    """The update a run ends with: `run.stop_at`, else the horizon. It made `since.update` of them."""
    stop = config.run.stop_at
    if stop is None:
        return schedule.total_updates
    if stop.unit == "tokens":
        left = int(stop.value) - since.samples * config.batch.seq_len
        return since.update + -(-left // config.batch.tokens)
    return stop.updates(config.batch.tokens, schedule.total_updates)


def clock(segments: Segments, seq_len: int) -> list[list[int]]:
    """Segments of samples as the segments of tokens that a schedule's clock counts."""
    return [[update, samples * seq_len, sequences * seq_len] for update, samples, sequences in segments]


def require_same_trajectory(there: dict[str, Any], here: dict[str, Any], where: str, but: str = "") -> None:
    """Raise CheckpointError where more than the field `but` differs."""
    rows = differences({**there, "batch_segments": None}, {**here, "batch_segments": None})
    if [name for name, _, _ in rows if name != but]:
        table = "\n".join(f"  {name}: there {old!r}, in this config {new!r}" for name, old, new in rows)
        raise CheckpointError(f"{where} belongs to another run:\n{table}\nPut the values back, or use another run.dir")


def _refused(config: Config, saved: Schedule, configured: Schedule, at: int, sequences: int) -> str:
    """Why the run does not go on unasked, and the ways on."""
    lines = [] if continues(saved, configured) else [refusal(saved, configured, at)]
    modes = "extend or --schedule-change replace"
    if sequences != config.batch.sequences:
        lines.append(f"the global batch was {sequences} sequences, in this config it is {config.batch.sequences}.")
        if config.schedule.horizon.unit == "steps":
            lines.append(
                "schedule.horizon is in steps: an update would stand for another number of tokens, and the curve over "
                "tokens would bend. Put batch back, write the schedule in tokens, or accept the bend with replace."
            )
            modes = "replace"
    branch = f"a new run.dir and --set run.branch_from={config.run.dir}@{at}"
    lines.append(f"(on the command line: --schedule-change {modes}; for a branch {branch})")
    return "\n".join(lines)


def _said(
    config: Config, mode: Mode, saved: Schedule, configured: Schedule, joined: Schedule, at: int, sequences: int
) -> list[str]:
    lines = [f"{mode.upper()} after update {at}: schedule {saved.name} {saved.hash} -> {joined.name} {joined.hash}"]
    if not continues(saved, configured):
        lines.append(both_sides(saved, configured))
    if sequences != config.batch.sequences:
        lines.append(f"  global batch {sequences} -> {config.batch.sequences} sequences")
    lines.append(f"  LR of update {at} was {saved.lr(at):.6e}, update {at + 1} gets {joined.lr(at + 1):.6e}")
    return lines
