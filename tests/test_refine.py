"""`llmtrain schedule refine`: from the gradient norms of a pilot run comes the schedule that the formula gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main
from llmtrain.config_file import load_config
from llmtrain.errors import DataError
from llmtrain.schedules import plan
from llmtrain.study.refine import refine
from tests.compare_runs import REPO, write_run

UPDATES = 1000


def pilot(folder: Path, norm: Callable[[int], Any], *overrides: str, keep: Callable[[int], bool] = bool) -> Path:
    """A run with these norms; `keep` says of which updates it has rows."""
    write_run(folder, 4.5, *overrides, updates=UPDATES)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "grad_norm": norm(row["step"])} for row in rows if row["kind"] != "step" or keep(row["step"])]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def multipliers(found: Any) -> np.ndarray:
    return found.shown[0].schedule.multipliers(np.arange(1, UPDATES + 1))


def test_equal_norms_give_the_straight_line(tmp_path: Path) -> None:
    """Without anything to refine, the schedule would not be the one that theory gives."""
    found = refine(pilot(tmp_path / "run", lambda k: 2.5))
    np.testing.assert_allclose(multipliers(found), 1 - np.arange(1, UPDATES + 1) / UPDATES, atol=1e-12)
    assert "no warm-up" in found.derived[0] and "half the peak at update 500 (50.0%)" in found.derived[1]


def test_norms_give_what_the_formula_gives(tmp_path: Path) -> None:
    """The warm-up that large early gradients ask for would come out too long, too short, or not at all."""
    found = refine(pilot(tmp_path / "run", lambda k: 1 / (k / UPDATES + 0.1)))
    x = np.arange(1, UPDATES + 1) / UPDATES
    wanted = (x + 0.1) * (1.1**2 - (x + 0.1) ** 2)  # w(x) times the integral of w from x to 1
    inside = slice(UPDATES // 20, -UPDATES // 20)  # the median has no full window at the ends
    np.testing.assert_allclose(multipliers(found)[inside], (wanted / wanted.max())[inside], atol=0.01)
    assert "warm-up from 0." in found.derived[0] and "the peak comes at update 5" in found.derived[0]


def test_spikes_do_not_show(tmp_path: Path) -> None:
    """One bad batch of the pilot would tear a hole into the schedule."""
    spiky = refine(pilot(tmp_path / "spiky", lambda k: 1000.0 if k % 97 == 0 else 1.0))
    smooth = refine(pilot(tmp_path / "smooth", lambda k: 1.0))
    assert multipliers(spiky).tolist() == multipliers(smooth).tolist()


def test_the_section_runs_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was shown would not be what a config with the written section trains on."""
    run = pilot(tmp_path / "run", lambda k: 1 / (k / UPDATES + 0.1))
    out, png = tmp_path / "new/refined.yaml", tmp_path / "new/refined.png"
    with pytest.raises(SystemExit) as ended:
        main(["schedule", "refine", str(run), "--json", "--out", str(out), "--png", str(png)])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and png.read_bytes().startswith(b"\x89PNG")
    (run / "metrics.jsonl").unlink()
    text = (REPO / "configs/demo_cosine.yaml").read_text().splitlines(keepends=True)
    base = "".join(line for line in text if not line.startswith("schedule:"))
    (tmp_path / "config.yaml").write_text(base + out.read_text())
    config = load_config(tmp_path / "config.yaml")
    schedule = plan(config.schedule, config.batch.tokens)
    assert [schedule.lr(k) for k in range(1, UPDATES + 1)] == found["schedules"][0]["lr"]
    assert found["schedule"]["peak"] == config.schedule.peak == 1.5e-3
    assert [one["name"] for one in found["schedules"]] == ["refined", "run"]


def test_a_reader_is_told_what_to_doubt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms before clipping, of another kind than the paper's, would pass for what the paper means."""
    run = pilot(tmp_path / "run", lambda k: 2.0 if k <= 250 else 0.5, "run.stop_at=500 steps")
    with pytest.raises(SystemExit):
        main(["schedule", "refine", str(run)])
    out = capsys.readouterr().out
    assert "the pilot clipped 50% of its updates to 1," in out
    assert "has the 2-norm of the gradient; for Adam the paper takes the 1-norm" in out
    assert "made 500 of its 1,000 updates" in out and "horizon: 500 steps" in out
    free = refine(pilot(tmp_path / "free", lambda k: 2.0, "optim.clip=null"))
    assert not any("clipped" in text for text in free.warnings)
    tokens = refine(pilot(tmp_path / "tokens", lambda k: 2.0, f"schedule.horizon={UPDATES * 4096} tokens"))
    assert tokens.section["horizon"] == f"{UPDATES * 4096} tokens"
    assert multipliers(tokens).tolist() == multipliers(free).tolist()


def test_norms_that_say_nothing_are_refused(tmp_path: Path) -> None:
    """A schedule would be made from a run that diverged, was cut, or has holes."""
    with pytest.raises(DataError, match=r"metrics\.jsonl has 99 updates, wanted 100 or more"):
        refine(pilot(tmp_path / "short", lambda k: 1.0, keep=lambda k: k < 100))
    with pytest.raises(DataError, match="after update 499 comes 501: rows are missing"):
        refine(pilot(tmp_path / "gap", lambda k: 1.0, keep=lambda k: k != 500))
    with pytest.raises(DataError, match="starts at update 301, wanted the norms from update 1 on"):
        refine(pilot(tmp_path / "branch", lambda k: 1.0, keep=lambda k: k > 300))
    for index, (bad, shown) in enumerate([(float("nan"), "nan"), (float("inf"), "inf"), (0.0, "0.0"), (None, "None")]):
        with pytest.raises(DataError, match=f"grad_norm of update 700 is {shown}, wanted a finite number above 0"):
            refine(pilot(tmp_path / f"bad_{index}", lambda k, bad=bad: bad if k == 700 else 1.0))  # type: ignore[misc]
