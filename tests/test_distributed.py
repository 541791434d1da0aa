"""Who am I, and do the ranks agree?"""

import json
import time
from pathlib import Path

import pytest

from llmtrain.distributed import Place, find_place, open_world
from llmtrain.errors import EnvironmentError
from tests import ranks

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
SBATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (TORCHRUN, Place(5, 8, 1, 4)),
        (DEEPSPEED, Place(1, 2, 1, 2)),
        (SRUN, Place(3, 6, 1, 2)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1,3(x2)"}, Place(3, 6, 1, 3)),
        ({**SBATCH, **TORCHRUN}, Place(5, 8, 1, 4)),
        (SBATCH, Place(0, 1, 0, 1)),
        ({**SBATCH, "SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0, 1)),
        ({}, Place(0, 1, 0, 1)),
    ],
    ids=["torchrun", "deepspeed", "srun", "srun uneven", "torchrun in sbatch", "sbatch", "sbatch step of one", "none"],
)
def test_every_launcher_is_understood(environment: dict[str, str], place: Place) -> None:
    """Ranks would train alone, or take each other's GPU."""
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is not below world size 8"),
        ({**TORCHRUN, "RANK": "-1"}, "rank -1"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 is not below the node's 4 processes"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, 'WORLD_SIZE is "two"'),
        ({"RANK": "1"}, "RANK is set, but RANK and WORLD_SIZE belong together"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK and WORLD_SIZE belong together"),
        ({**SRUN, "SLURM_PROCID": "6"}, "SLURM_PROCID"),
        ({**SRUN, "SLURM_LOCALID": ""}, None),
    ],
)
def test_a_contradiction_is_refused(environment: dict[str, str], said: str | None) -> None:
    """A rank that misunderstands its place would hang the others, or train a run of its own in their folder."""
    if said is None:
        assert find_place(environment).local_rank == 0
        return
    with pytest.raises(EnvironmentError, match=said.replace("(", r"\(")):
        find_place(environment)


def agree() -> None:
    """On each of three ranks: what is gathered, however long the texts are."""
    with open_world(60, collectives=True) as world:
        texts = world.gather_text("é" * 1000 * world.rank + " ")
        assert texts == ["é" * 1000 * rank + " " for rank in range(3)]
        assert world.gather_text("") == ["", "", ""]
        world.barrier()


def agree_on_largest(output: Path) -> None:
    """Every rank in turn has the largest value."""
    with open_world(60, collectives=True) as world:
        found = [world.largest(int(rank == world.rank), -world.rank - rank) for rank in range(world.size)]
        found.append([world.any(world.rank == world.size - 1), world.any(False)])
        world.barrier()
        (output / f"{world.size}_{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_what_one_rank_says_every_rank_hears(tmp_path: Path, count: int) -> None:
    """A rank would go on alone while the others stop, or wait for ever."""
    ranks.start(tmp_path / "logs", count, agree_on_largest, tmp_path).succeeded()
    told = [json.loads((tmp_path / f"{count}_{rank}.json").read_text()) for rank in range(count)]
    assert told == [[*([1, -rank] for rank in range(count)), [True, False]]] * count


def hear_late(output: Path) -> None:
    """Rank 1 comes later than the ranks were given to meet, but within the time they wait for each other."""
    with open_world(60, collectives=True, meet_timeout_s=2) as world:
        time.sleep(4 * world.rank)
        world.barrier()


def test_a_message_may_take_longer_than_the_connection(tmp_path: Path) -> None:
    """A validation that takes two minutes on one rank would end the job."""
    ranks.start(tmp_path / "logs", 2, hear_late, tmp_path).succeeded()


def test_texts_of_all_ranks_are_gathered(tmp_path: Path) -> None:
    """Ranks would agree on cut-off or mixed-up messages."""
    ranks.start(tmp_path / "logs", 3, agree).succeeded()
