"""Does the law do on public loss curves what was published of it?

The curves (Luo 2025, arXiv:2503.12811; a 100M model under nine schedules) are looked for in the folder that
LLMTRAIN_LOSS_CURVES names, or beside the repository in shared/data/loss_curves_100m.
"""

import os
from pathlib import Path

import pytest

from llmtrain.study.law.curves import read_curve
from llmtrain.study.law.fitted import fit_curves
from llmtrain.study.law.kept import report

_BESIDE = Path(__file__).parent.parent.parent / "shared" / "data" / "loss_curves_100m"
FOLDER = Path(os.environ.get("LLMTRAIN_LOSS_CURVES", _BESIDE))
WARMUP = 2160
NAMES = (
    "constant_24000",
    "constant_72000",
    "cosine_24000",
    "cosine_72000",
    "wsd_20000_24000",
    "wsdcon_18",
    "wsdcon_3",
    "wsdcon_9",
    "wsdld_20000_24000",
)

pytestmark = pytest.mark.skipif(
    not all((FOLDER / f"{name}.csv").is_file() for name in NAMES),
    reason="the public loss curves are not here; LLMTRAIN_LOSS_CURVES=FOLDER says where they are",
)


@pytest.mark.parametrize(
    "fitted, mean, worst",
    [
        (("cosine_24000", "constant_24000", "wsdcon_9"), 0.0014, 0.0075),
        (("cosine_24000", "wsdld_20000_24000"), 0.0020, 0.0120),
    ],
    ids=["as published", "two runs"],
)
def test_unseen_schedules_are_predicted(fitted: tuple[str, ...], mean: float, worst: float) -> None:
    """The law would be worse on real models than the published fits of it, or surer than it may be."""
    curves = {name: read_curve(FOLDER / f"{name}.csv", WARMUP) for name in NAMES}
    train = [curves[name] for name in fitted]
    found = report(fit_curves(train), train, [curve for name, curve in curves.items() if name not in fitted])
    assert found["test"]["mean_relative_error"] <= mean
    assert found["test"]["worst_relative_error"] <= worst
    assert found["test"]["covered_by_95_percent"] >= 0.9
    for name in ("time", "area"):
        assert found["laws"][name]["test"]["mean_relative_error"] > 3 * found["test"]["mean_relative_error"]
