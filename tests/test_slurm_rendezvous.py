"""Ranks that srun started find each other, on any port that is free, or say which of them cannot."""

import socket
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from llmtrain import rendezvous
from llmtrain.errors import EnvironmentError
from llmtrain.rendezvous import meet


@pytest.fixture(autouse=True)
def step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 0 of job 12 on node n0, a name that nobody can resolve."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURMD_NODENAME": "n0.invalid"}.items():
        monkeypatch.setenv(name, value)


def joined(folder: Path, rank: int) -> bytes:
    """What this rank finds in the store it shares with rank 0."""
    with meet(rank, 2, folder, 30) as store:
        store.set_timeout(timedelta(seconds=30))
        store.set("here", str(rank))
        found: bytes = store.get("greeting")
        return found


def test_two_jobs_on_one_host_meet_each_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second job on a node would be refused the port, or train with the ranks of the first."""
    found = []
    for job in ("12", "13"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with meet(0, 2, tmp_path, 30) as store:
            (file,) = tmp_path.glob("rendezvous*")
            assert file.name == f"rendezvous.{job}.0.0.json"
            store.set("greeting", f"job {job}")
            other = threading.Thread(target=lambda: found.append(joined(tmp_path, 1)))
            other.start()
            other.join(60)
            assert store.get("here") == b"1"
    assert found == [b"job 12", b"job 13"]
    assert not list(tmp_path.iterdir())


def test_a_given_address_and_port_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that opens one port, or names its fast network otherwise, could not be used."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("MASTER_ADDR", "n0-ib")
    with meet(0, 2, tmp_path, 30):
        told = (tmp_path / "rendezvous.12.0.0.json").read_text()
    assert told == f'{{"addresses": ["n0-ib"], "port": {port}}}'
    monkeypatch.setenv("MASTER_PORT", "ssh")
    with pytest.raises(EnvironmentError, match='MASTER_PORT is "ssh", which is not a number'), meet(0, 2, tmp_path, 30):
        pass


def test_a_rank_that_finds_nobody_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would wait half an hour to learn nothing about which node cannot reach which."""
    monkeypatch.setattr(rendezvous, "FILE_S", 0.0)
    monkeypatch.setattr(rendezvous, "CONNECT_S", 0.0)
    with pytest.raises(EnvironmentError, match=r"rank 1 on n0.invalid waited 0 s for .*rendezvous.12.0.0.json"):
        joined(tmp_path, 1)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    (tmp_path / "rendezvous.12.0.0.json").write_text(f'{{"addresses": ["n7.invalid", "127.0.0.1"], "port": {port}}}')
    with pytest.raises(EnvironmentError) as refused:
        joined(tmp_path, 1)
    assert f"rank 1 on n0.invalid cannot reach rank 0 at n7.invalid:{port} (" in str(refused.value)
    assert f" or 127.0.0.1:{port} (Connection refused)" in str(refused.value)
