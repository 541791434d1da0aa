"""Before the first update: who did not come, who is not like the others, and which link is slow."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from llmtrain.arrival import expand, expected_nodes
from llmtrain.cli import main
from llmtrain.distributed import open_world
from llmtrain.errors import EnvironmentError
from llmtrain.train import preflight
from llmtrain.train.preflight import Link, differences, measure, notices, slow_links
from tests import ranks
from tests.conftest import text_folder

SIZE = 2**20


def unlike(folder: str) -> None:
    """Train, each rank in a working directory of its own with its own config and data; rank 1 has other code too."""
    rank = os.environ["RANK"]
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    os.chdir(Path(folder) / f"node{rank}")
    if rank == "1":
        own = {**dict(preflight._code()), "llmtrain/model/decoder.py": "0" * 16}
        preflight._code = lambda: iter(own.items())
        torch.__version__ = "2.9.0"  # type: ignore[assignment]
    main(["train", "--config", "config.yaml"])


def test_all_that_differs_on_a_rank_is_named_before_the_first_update(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A part of the run would train on old code, another schedule or other text, and nothing would look wrong."""
    config = {**prepared, "run": {**prepared["run"], "dir": str(tmp_path / "run")}}
    config["engine"] = {**prepared["engine"], "kind": "fsdp"}
    config["batch"] = {**prepared["batch"], "global_sequences": 6}
    for rank in range(3):
        folder = tmp_path / f"node{rank}"
        folder.mkdir()
        config["schedule"] = {**prepared["schedule"], "peak": 0.02 if rank == 1 else 0.01}
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**prepared["data"], "path": "data"}}))
        (folder / "data").symlink_to(other_text(prepared, tmp_path) if rank == 1 else prepared["data"]["path"])
    running = ranks.start(tmp_path / "logs", 3, unlike, str(tmp_path))
    assert running.wait() == [2, 2, 2], running.text()
    said = running.text()
    assert "error: the ranks are not alike, nothing was trained:" in said
    assert "  rank 1 on node1: code: llmtrain/model/decoder.py is 0000000000000000, on rank 0 on node0 " in said
    assert "  rank 1 on node1: config: schedule.peak is 0.02, on rank 0 on node0 0.01\n" in said
    assert "  rank 1 on node1: data: tokens is " in said
    assert "  rank 1 on node1: versions: torch is 2.9.0, on rank 0 on node0 " in said
    assert "  rank 0" not in said and "  rank 2" not in said
    assert not (tmp_path / "run").exists()


def other_text(prepared: dict[str, Any], folder: Path) -> Path:
    """A data folder prepared from one document more."""
    text = text_folder(folder / "text")
    (text / "more.txt").write_text("one more document\n")
    source = {"kind": "text", "paths": [str(text)]}
    path = folder / "prepare.yaml"
    path.write_text(
        yaml.safe_dump({**prepared, "data": {**prepared["data"], "source": source, "path": str(folder / "data")}})
    )
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--config", str(path), "--workers", "1"])
    assert ended.value.code == 0
    return folder / "data"


def absent(missing: str) -> None:
    """Meet the others, within 2 seconds; one rank ended before."""
    os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"
    if os.environ["RANK"] == missing:
        return
    try:
        with open_world(60, collectives=True, meet_timeout_s=2):
            raise AssertionError("met without it")
    except EnvironmentError as error:
        print(f"told: {error}")


@pytest.mark.parametrize("missing", ["1", "0"])
def test_a_rank_that_does_not_come_is_named_by_all_others(tmp_path: Path, missing: str) -> None:
    """All nodes would wait half an hour for one that is down, and then not know which it was."""
    said = ranks.start(tmp_path, 3, absent, missing).succeeded().text()
    if missing == "1":
        assert (
            said.count("told: rank 1 did not come within 2 s (engine.meet_timeout_s), the other 2 of 3 ranks did") == 2
        )
    else:
        for rank in (1, 2):
            assert f"told: rank {rank} of 3 on node{rank} could not meet the others at 127.0.0.1:" in said


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("n0", ["n0"]),
        ("n[0-1]", ["n0", "n1"]),
        ("a[01-03,7],b2,c[9-10]-ib", ["a01", "a02", "a03", "a7", "b2", "c9-ib", "c10-ib"]),
        ("", []),
    ],
)
def test_slurm_s_list_of_nodes_is_read(written: str, names: list[str]) -> None:
    """A node that is down could not be named, because nothing of it ever arrived."""
    assert list(expand(written)) == names
    environment = {"SLURM_STEP_NODELIST": written, "SLURM_STEP_TASKS_PER_NODE": f"2(x{len(names)})"}
    assert expected_nodes(environment) == [name for name in names for _ in range(2)]
    assert expected_nodes({**environment, "RANK": "0"}) == []


def measured(slow: int) -> None:
    """Time the links; what one rank sends takes half a second longer."""
    os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"
    with open_world(60, collectives=True) as world:
        send = dist.isend
        if world.rank == slow:
            dist.isend = dist.distributed_c10d.isend = lambda *given, **named: Late(send, given, named)
        print("\n".join(measure(world)))


class Late:
    """A message on a slow wire."""

    def __init__(self, send: Any, given: Any, named: Any) -> None:
        self.thread = threading.Thread(target=self.work, args=(send, given, named))
        self.thread.start()

    def work(self, send: Any, given: Any, named: Any) -> None:
        time.sleep(0.5)
        send(*given, **named).wait()

    def wait(self, timeout: object = None) -> None:
        self.thread.join()


@pytest.mark.parametrize("count", [2, 3])
def test_a_slow_link_is_named(tmp_path: Path, count: int) -> None:
    """One bad cable halves the speed of a thousand GPUs, and an all-reduce is equally slow on all of them."""
    said = ranks.start(tmp_path, count, measured, 1).succeeded().text()
    assert f"{count} ranks on {count} nodes are alike; an all-reduce of 1 MiB takes " in said
    assert f"SLOW: rank 1 on node1 to rank {2 % count} on node{2 % count}: 0.00" in said


def test_one_slow_rank_is_told_from_two_slow_links() -> None:
    """The neighbours of a slow node would be blamed too; within a node messages are always faster than between two."""
    nodes = ["a", "a", "b", "b", "c", "c"]
    seconds = [0.2, 0.01, 0.9, 0.9, 0.2, 0.01]
    links = [Link((r - 1) % 6, r, seconds[r], nodes[r - 1] != nodes[r]) for r in range(6)]
    assert slow_links(links, nodes, SIZE) == [
        "SLOW: rank 1 on a to rank 2 on b: 0.001 GB/s, where 0.005 is usual",
        "SLOW: rank 2 on b to rank 3 on b: 0.001 GB/s, where 0.105 is usual",
        "SLOW: rank 2 on b is at the end of both",
    ]
    assert slow_links([link._replace(seconds=0.01) for link in links], nodes, SIZE) == []


def test_what_may_be_meant_is_noticed() -> None:
    """A full disk, a GPU that another job uses and a clock an hour off would show only after hours."""
    usual = {"node": "n", "clock": 1000.0, "free_gib": {"/tmp": 5.0}, "gpu": "H100", "gpu_free": 0.99}
    told = [
        usual,
        {**usual, "clock": 1030.0},
        {**usual, "free_gib": {"/tmp": 0.5}},
        {**usual, "gpu_free": 0.5},
        {**usual, "gpu": "A100"},
    ]
    assert notices([usual] * 3) == []
    assert notices(told) == [
        "the clock of rank 1 on n is +30 s from the others'",
        "/tmp of rank 2 on n has 0.50 GiB free",
        "the GPU of rank 3 on n is in use: 50% of its memory is free",
        "the GPU of rank 4 on n is a A100, the others' are H100",
    ]


def test_ranks_that_differ_alike_share_a_line() -> None:
    """A node with the old checkout would fill the screen, a line for each of its GPUs."""
    old, new = {"code": {"a.py": "1", "b.py": "1"}}, {"code": {"a.py": "2", "c.py": "2"}}
    assert differences([old, new, new, old, new], ["x", "y", "y", "x", "y"]) == [
        "ranks 0, 3 on x: code: a.py is 1, on rank 1 on y 2; c.py is missing, on rank 1 on y 2; "
        "b.py is 1, on rank 1 on y missing"
    ]
    assert differences([old, new], ["x", "y"])[0].startswith("rank 1 on y: code: a.py is 2, on rank 0 on x 1")
