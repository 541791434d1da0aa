"""Checkpoints elsewhere: an object store is as safe as a disk, and may be gone for a while."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llmtrain.checkpoint import saver as saver_module
from llmtrain.checkpoint.places import Place
from llmtrain.checkpoint.saver import Saver
from llmtrain.checkpoint.store import CheckpointStore, open_checkpoint
from llmtrain.cli import main
from llmtrain.engines.base import EXP_AVG_SQ
from llmtrain.errors import CheckpointError
from tests import ranks
from tests.test_checkpoint import ALONE, flat
from tests.test_resume import history, weights
from tests.test_saver import save
from tests.test_train import command, train_here

pytest.importorskip("s3fs", reason="needs the packages of the extra `s3`")
server = pytest.importorskip("moto.server", reason="needs moto, an object store for tests")

RANK_0 = "rank_00000.safetensors"
MODES = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}


class ObjectStore:
    """A local S3. What it holds outlives `stop`, as a store that is unreachable for a while."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **MODES, **KEYS}
        self.start()

    def start(self) -> None:
        self.server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A local S3 with an empty bucket."""
    running = ObjectStore(*ranks.free_ports(1))
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("bucket")
    yield running
    files.rm("bucket", recursive=True)
    running.stop()


@pytest.fixture(params=["disk", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for checkpoints: a folder, memory, or a bucket."""
    if request.param == "s3":
        request.getfixturevalue("store")
        return "s3://bucket/run"
    return f"memory://{tmp_path.name}/run" if request.param == "memory" else str(tmp_path / "run")


def filled(url: str, staging: Path, *updates: int, keep: int = 9) -> CheckpointStore:
    store = CheckpointStore(url, ALONE, keep, staging=staging)
    for update in updates:
        assert store.save(flat(update), {"step": update}) is None
    return store


def test_a_checkpoint_is_the_same_anywhere(url: str, tmp_path: Path) -> None:
    """A run in the cloud would lose what a run on a disk keeps: the newest, its ranges, the ones before it."""
    store = filled(url, tmp_path / "staging", 10, 20, 30, 40, keep=2)
    assert store.place.listing() == (["step_00000040", "step_00000030"], [], [], [], "step_00000040")
    store.require_room(flat(0))
    found, rejected = CheckpointStore(url, ALONE, 2).newest_valid()
    assert found is not None
    assert (found.step, rejected, found.path) == (40, [], f"{url}/step_00000040")
    assert found.reader.read("a.weight", EXP_AVG_SQ, 3, 6).tolist() == [44.0, 45.0, 46.0]
    assert open_checkpoint(f"{url}/step_00000030").step == 30
    assert store.save(flat(40), {"step": 40}) is None
    assert store.supersede(30) == ["step_00000040"]
    assert store.place.listing().published == ["step_00000030"]
    left = [path.name for path in (tmp_path / "staging").rglob("*")] if (tmp_path / "staging").exists() else []
    assert left == []


@pytest.mark.parametrize("harm", ["no manifest", "half a file", "flipped byte", "no state"])
def test_what_is_not_whole_is_passed_over_anywhere(url: str, tmp_path: Path, harm: str) -> None:
    """An upload that was cut short would be taken for a checkpoint."""
    store = filled(url, tmp_path / "staging", 10, 20)
    place, folder = store.place, f"{store.place.root}/step_00000020"
    data = place.read(f"step_00000020/{RANK_0}")
    if harm == "no manifest":
        place.fs.rm(f"{folder}/manifest.json")
    elif harm == "no state":
        place.fs.rm(f"{folder}/state.json")
    else:
        middle = len(data) // 2
        data = data[:middle] if harm == "half a file" else data[:middle] + b"\xff" + data[middle + 1 :]
        place.fs.pipe_file(f"{folder}/{RANK_0}", data)
    found, rejected = store.newest_valid()
    assert found is not None
    assert found.step == 10
    assert any(text.startswith("step_00000020: ") for text in rejected), rejected
    assert store.save(flat(20), {"step": 20}) is None
    assert store.save(flat(30), {"step": 30}) is None
    found, rejected = store.newest_valid()
    assert found is not None
    assert (found.step, rejected) == (30, [])
    assert store.place.listing().published == ["step_00000030", "step_00000020", "step_00000010"]


def test_the_manifest_is_uploaded_last(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two uploads would leave something that looks like a checkpoint."""
    delivered = []
    deliver = Place.deliver

    def watch(self: Place, name: str, file: str) -> None:
        published = self.fs.exists(f"{self.root}/{name}/manifest.json")
        delivered.append((file, published))
        deliver(self, name, file)

    monkeypatch.setattr(Place, "deliver", watch)
    filled("s3://bucket/run", tmp_path / "staging", 10)
    assert delivered == [(RANK_0, False), ("index.json", False), ("state.json", False), ("manifest.json", False)]


def elsewhere(environment: dict[str, str], words: list[str]) -> None:
    """One leg with the store's address in its environment."""
    os.environ.update(environment)
    main(words)


def test_a_run_lives_in_a_store(prepared: dict[str, Any], tmp_path: Path, store: ObjectStore) -> None:
    """A user without a shared disk could not train, or would get another model."""
    straight = command(prepared, tmp_path / "straight", "engine.kind=fsdp")
    ranks.start(tmp_path / "log_straight", 2, main, straight).succeeded()
    run = tmp_path / "run"
    there = ("engine.kind=fsdp", "checkpoint.dir=s3://bucket/run", "checkpoint.every=4 steps")
    for leg, stop in enumerate((7, 20)):
        words = command(prepared, run, *there, f"run.stop_at={stop} steps", resume=("never", "must")[leg])
        text = ranks.start(tmp_path / f"log_{leg}", 2, elsewhere, store.environment, words).succeeded().text()
    assert "RESUMED run=small step=7 " in text
    assert "from=s3://bucket/run/step_00000007" in text
    assert history(run) == history(tmp_path / "straight")
    assert not (run / "checkpoints").exists()
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    ours = [files.cat_file(f"bucket/run/step_00000020/rank_0000{rank}.safetensors") for rank in (0, 1)]
    assert ours == weights(tmp_path / "straight")


def test_a_store_that_is_gone_for_a_while_costs_nothing(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of the store, or a broken network, would end the run or lose its checkpoint."""
    monkeypatch.setattr(saver_module, "RETRY_S", 0.5)
    failed, said = threading.Event(), []

    def hear(text: str) -> None:
        said.append(text)
        if "NOT SAVED" in text:
            failed.set()

    with Saver(filled("s3://bucket/run", tmp_path / "staging", 10), flat(0), hear, background=True) as saver:
        store.stop()
        save(saver, flat(20), 20)
        assert failed.wait(120)
        store.start()
        assert saver.finish() is None
    assert "step 20  NOT SAVED, it is tried again while training goes on: rank 0: " in said[0]
    assert said[-1] == "step 20  saved s3://bucket/run/step_00000020"
    assert filled("s3://bucket/run", tmp_path / "staging").place.listing().published[0] == "step_00000020"


def test_a_place_that_cannot_be_used_is_told_before_the_first_update(
    prepared: dict[str, Any], tmp_path: Path, store: ObjectStore
) -> None:
    """A misspelt bucket, or a scheme without its package, would be found at the first save, hours later."""
    for url, why in (("s3://no-such-bucket/run", "no-such-bucket"), ("nowhere://x", "nowhere")):
        with pytest.raises(CheckpointError, match=why):
            train_here(prepared, tmp_path / "run", f"checkpoint.dir={url}")
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_folder_that_became_read_only_costs_no_update(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A file system that was remounted read-only for a minute would end the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        run, words = tmp_path / "run", (f"checkpoint.dir={disk}/checkpoints", "checkpoint.every=5 steps")
        train_here(prepared, run, *words, "run.stop_at=5 steps")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system"):
            train_here(prepared, run, *words)
        leg = command(prepared, run, *words, resume="must")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        text = ranks.start(tmp_path / "log", 1, read_only_from_10_to_15, disk, leg).succeeded().text()
        for update in (10, 15):
            assert f"step {update}  NOT SAVED, it is tried again while training goes on: " in text
        assert "Read-only file system" in text
        published = Place(disk / "checkpoints").listing().published
        assert published[0] == "step_00000020"
        assert published[-1] == "step_00000005"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def read_only_from_10_to_15(disk: Path, words: list[str]) -> None:
    """Train on a disk that is read-only while updates 10 to 15 are saved."""
    tried: list[int] = []
    write = CheckpointStore.save

    def remount(self: CheckpointStore, state: Any, *arguments: Any, **more: Any) -> str | None:
        if state.update == 10 and not tried:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        tried.append(state.update)
        problem = write(self, state, *arguments, **more)
        if state.update == 15:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return problem

    CheckpointStore.save = remount  # type: ignore[method-assign]
    main(words)
