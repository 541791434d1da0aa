"""Kills at random moments cost nothing: a shortened `tests/chaos.py`."""

from pathlib import Path
from typing import Any

from tests.chaos import chaos


def test_a_run_killed_at_random_comes_out_the_same(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A preempted run could not be started again, would lose hours, or would be another one afterwards."""
    found = chaos(prepared, tmp_path, kills=8, updates=60, seed=3, say=print)
    assert found["kills"] == 8
    assert found["aimed_at_a_save"] == 4
    assert found["same_bytes"] == {"weights": True, "metrics": True}
    assert found["lost_updates"]["most"] <= 6
