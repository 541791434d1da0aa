"""`llmtrain branch`: cooldowns and other curves from the checkpoints of a trunk. Needs no torch but to train."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmtrain.study.branch import Branch
    from llmtrain.study.branch_budgets import Cost, Plan


def branch(
    run: Annotated[str, typer.Argument(metavar="RUN@UPDATE|RUN", help="A checkpoint; with --budgets the trunk alone.")],
    schedule: Annotated[
        str | None,
        typer.Option(metavar="SCHEDULE", help='"cooldown(1-sqrt, 20%)", "cooldown(linear, 500 steps)", wsd:decay=10%.'),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the new run; with --budgets the start of all names.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="The new run folder; with --budgets the folder of all. [by the trunk]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, for example schedule.floor=0."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(metavar="D,D,...", help='Whole runs to cool down for: 1B,2B tokens, "2000 steps".')
    ] = None,
    shapes: Annotated[str, typer.Option(metavar="SHAPE,...", help="Cooldowns for each budget.")] = "linear",
    cooldown: Annotated[str, typer.Option(metavar="LENGTH", help="Of each, as a share of its budget.")] = "20%",
    train: Annotated[bool, typer.Option("--train", help="Train here, one after another.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; RUN may be a config not trained yet.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Go on from a run's checkpoint as a run of its own, on another schedule. The trunk is only read."""
    if (schedule is None) == (budgets is None):
        raise typer.BadParameter("write --schedule for one branch of RUN@UPDATE, or --budgets for several of RUN")
    if schedule is not None and name is None:
        raise typer.BadParameter("--schedule needs --name, what to call the new run")
    if train and dry_run:
        raise typer.BadParameter("--dry-run writes nothing: leave out --train")
    if schedule is not None and name is not None:
        found = _one(run, schedule, name, folder, overrides or [])
        _carry_out([found], train, dry_run, quiet=as_json)
        print(json.dumps(_described(found), allow_nan=False)) if as_json else _print_one(found, dry_run, train)
        return
    from llmtrain.study.branch import open_trunk
    from llmtrain.study.branch_budgets import plan_budgets, remedies, require_checkpoints

    asked = [[part.strip() for part in text.split(",") if part.strip()] for text in (budgets or "", shapes)]
    plan = plan_budgets(open_trunk(Path(run)), asked[0], asked[1], cooldown, name, folder, overrides or [])
    if not dry_run:
        require_checkpoints(plan, cooldown)
    _carry_out([one.branch for one in plan.wanted], train, dry_run, quiet=as_json)
    if as_json:
        print(json.dumps(_plan_json(plan, dry_run), allow_nan=False))
        return
    _print_plan(plan, dry_run)
    for text in remedies(plan, cooldown):
        print(text)
    if not dry_run and not train:
        _print_commands([one.branch for one in plan.wanted])


def _one(run: str, schedule: str, name: str, folder: Path | None, overrides: Sequence[str]) -> "Branch":
    from llmtrain.errors import CheckpointError
    from llmtrain.study.branch import branch, open_trunk
    from llmtrain.study.branch_cooldown import section

    trunk_run, at, step = run.rpartition("@")
    if not at or not step.isdigit():
        saved = open_trunk(Path(run)).saved
        there = f"it has checkpoints of updates {', '.join(map(str, saved))}" if saved else "it has no checkpoint"
        raise CheckpointError(f"{run}: write RUN@UPDATE; {there}")
    parent = open_trunk(Path(trunk_run)).after(int(step))
    return branch(parent, section(parent, schedule), name, folder or Path(trunk_run).parent / name, overrides)


def _carry_out(branches: "Sequence[Branch]", train: bool, dry_run: bool, quiet: bool) -> None:
    """Write the configs, and train those that are not at their end."""
    if dry_run:
        return
    from llmtrain.study.branch import train_here, write
    from llmtrain.study.branch_budgets import result

    for one in branches:
        written = write(one)
        if not quiet:
            print(f"wrote {one.config_file}" if written else f"{one.config_file} is there already")
    for one in branches if train else ():
        if result(one).finished:
            continue
        print(f"training {one.folder}, its log is {one.folder / 'train.log'}", file=sys.stderr, flush=True)
        stopped = train_here(one)
        if stopped:
            print(f"STOPPED (signal {stopped}): the same command goes on from here", file=sys.stderr)
            raise typer.Exit


def _print_one(found: "Branch", dry_run: bool, trained: bool) -> None:
    from llmtrain.study.branch_budgets import result

    parent, at = found.parent, found.parent.step
    rows = [
        [str(at), f"{parent.before.lr(at):.6e}", f"{parent.run}, {parent.before.name}"],
        [str(at + 1), f"{found.schedule.lr(at + 1):.6e}", f"{found.folder}, {found.schedule.name}"],
        ["", f"{parent.before.lr(at + 1):.6e}", f"{parent.run} had it gone on"],
        [str(found.last), f"{found.schedule.lr(found.last):.6e}", f"{found.folder}, its end"],
    ]
    _print_table(["update", "learning rate", "of"], rows, left=(2,))
    if found.schedule.lr(found.last) >= parent.before.lr(at):
        print("the learning rate does not fall: --set schedule.floor=0 lets it")
    if trained:
        print(f"validation loss {_loss(result(found).loss)}")
    elif not dry_run:
        _print_commands([found])


def _print_commands(branches: "Sequence[Branch]") -> None:
    print("start:")
    for one in branches:
        for command in one.commands:
            print(f"  {command}")


def _print_plan(plan: "Plan", dry_run: bool) -> None:
    from llmtrain.study.branch_budgets import measured, result

    rows = []
    for one in plan.wanted:
        found, parent = one.branch, one.branch.parent
        here = f"{parent.before.lr(parent.step):.4e}"
        loss = "" if dry_run else _loss(result(found).loss)
        state = "no checkpoint" if parent.step in plan.missing else "" if dry_run else _state(found)
        rows.append(
            [found.config.run.name, one.budget, one.shape, str(parent.step), str(found.last), here, state, loss]
        )
    columns = ["run", "budget", "shape", "from", "to update", "LR there", "state", "loss"]
    _print_table(columns, rows, left=(0, 1, 2, 6))
    if any(one.branch.parent.before(one.branch.parent.step) != 1 for one in plan.wanted):
        print(f"{plan.trunk.run} is below its peak where cooldowns start: no WSD run from the start is like these")
    _print_cost("planned", plan.cost)
    made = None if dry_run else measured(plan)
    if made is not None:
        _print_cost("made", made)


def _print_cost(what: str, cost: "Cost") -> None:
    print(
        f"{what}: {cost.trunk:,} updates of the trunk and {cost.branches:,} of branches, against {cost.separate:,} of "
        f"separate runs: {cost.saved:.1%} saved"
    )


def _state(found: "Branch") -> str:
    from llmtrain.study.branch_budgets import result

    so_far = result(found)
    return "finished" if so_far.finished else f"{so_far.updates} made" if so_far.updates else "written"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _described(found: "Branch") -> dict[str, Any]:
    parent, at = found.parent, found.parent.step
    return {
        "run": str(found.folder),
        "branch_from": found.config.run.branch_from,
        "update": at,
        "last_update": found.last,
        "schedule": found.config.schedule.model_dump(mode="json"),
        "schedule_hash": found.schedule.hash,
        "lr": {
            "reached": parent.before.lr(at),
            "next": found.schedule.lr(at + 1),
            "trunk_next": parent.before.lr(at + 1),
            "last": found.schedule.lr(found.last),
        },
        "commands": found.commands,
    }


def _plan_json(plan: "Plan", dry_run: bool) -> dict[str, Any]:
    from llmtrain.study.branch_budgets import measured, result

    made = None if dry_run else measured(plan)
    results = [None if dry_run else result(one.branch)._asdict() for one in plan.wanted]
    return {
        "trunk": plan.trunk.run,
        "updates": plan.steps,
        "missing": plan.missing,
        "branches": [
            {"budget": one.budget, "shape": one.shape, **_described(one.branch), "result": so_far}
            for one, so_far in zip(plan.wanted, results, strict=True)
        ],
        "planned": {**plan.cost._asdict(), "saved": plan.cost.saved},
        "made": None if made is None else {**made._asdict(), "saved": made.saved},
    }


def _print_table(head: list[str], rows: list[list[str]], left: tuple[int, ...]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line in (head, *rows):
        cells = [
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
