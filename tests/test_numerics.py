"""Which kernels a run computes with, what is said of them, and what is refused."""

from typing import Any

import pytest
import torch

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.distributed import World
from llmtrain.engines import build_engine, numerics
from llmtrain.errors import ConfigError
from llmtrain.model import kernels
from llmtrain.model.kernels import MEASURED, choose_kernel
from llmtrain.train.join import require_same_trajectory
from llmtrain.trajectory import trajectory_of
from tests.test_projection import batches, described

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def changed(config: Config, **values: dict[str, Any]) -> Config:
    sections = config.model_dump(mode="json")
    return validate({name: {**section, **values.get(name, {})} for name, section in sections.items()}, "test")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The modules that can be imported; none at first."""
    there: set[str] = set()
    monkeypatch.setattr(kernels, "_importable", lambda module: module in there)
    return there


def test_an_operation_without_a_deterministic_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user would get a traceback of torch's, or a run that is not reproducible though it was asked to be."""
    config = described(deterministic=True)
    engine = build_engine(config, World(0, 1, 0, CPU))
    monkeypatch.setattr(
        torch.nn.functional, "silu", lambda x: x.clone().put_(torch.tensor([0]), torch.zeros(1, dtype=x.dtype))
    )
    with pytest.raises(ConfigError, match=r"engine\.deterministic: put_ has no deterministic kernel"), numerics.named():
        engine.train_step(batches(config, 1), 1.0)


def test_other_errors_pass_as_they_are() -> None:
    """A user would be told of kernels where memory ran out."""
    with pytest.raises(RuntimeError, match="out of memory"), numerics.named():
        raise RuntimeError("CUDA out of memory")


def test_a_run_resumes_with_other_kernels() -> None:
    """A user could not make a run exact from now on, or faster, without losing it."""
    config = described()
    other = changed(config, engine={"deterministic": True, "attention": "flex"})
    require_same_trajectory(trajectory_of(config, "hash"), trajectory_of(other, "hash"), "run")


def test_products_are_of_the_precision_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on a GPU would be TF32, which keeps a thousandth of what the user paid for."""
    monkeypatch.setattr(numerics, "use_kernel", lambda kernel: None)
    for precision, wanted in (("fp32", "highest"), ("tf32", "high"), ("bf16", "high")):
        numerics.set_numerics(described(precision=precision), GPU)
        assert torch.get_float32_matmul_precision() == wanted
    assert any("TF32" in line for line in numerics.described(described(precision="tf32"), GPU))
    assert not any("TF32" in line for line in numerics.described(described(precision="fp32"), GPU))


def test_the_banner_says_what_is_not_reproducible(packages: set[str]) -> None:
    """A user would compare two runs to the last bit and look for a mistake of their own."""
    said = "\n".join(numerics.described(described(compile=True), GPU))
    assert "not reproducible" in said and "engine.deterministic" in said and "the compiler" in said
    assert "not reproducible" not in "\n".join(numerics.described(described(deterministic=True), GPU))
    assert numerics.described(described(), CPU) == []


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_the_fastest_kernel_that_is_there_is_taken(row: kernels.Measured, packages: set[str]) -> None:
    """A run would take a slower kernel than it could."""
    packages |= {"cudnn"}
    heads = 4
    model = {"hidden_size": heads * row.head_size, "num_heads": heads, "max_seq_len": row.seq_len}
    config = changed(described(deterministic=row.deterministic), model=model, batch={"seq_len": row.seq_len})
    fastest = min(row.milliseconds, key=lambda kernel: row.milliseconds[kernel])
    assert choose_kernel(config).kernel == fastest
    assert f"{fastest} {row.milliseconds[fastest]:g}" in choose_kernel(config).reason
    packages.clear()
    if row.deterministic and fastest == "cudnn":
        assert choose_kernel(config).kernel in row.milliseconds.keys() - {"cudnn"}
    else:
        assert choose_kernel(config).kernel == fastest


@pytest.mark.parametrize(
    ("engine", "data", "named"),
    [
        ({"attention": "flash4"}, {}, "flash_attn.cute is not installed"),
        ({"attention": "cudnn", "deterministic": True}, {}, r"pip install .llmtrain\[cudnn\]"),
        ({"attention": "cudnn", "precision": "fp32"}, {}, "engine.precision is fp32"),
        ({"attention": "flash"}, {"document_mask": True}, "only flex"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(
    engine: dict[str, Any], data: dict[str, Any], named: str, packages: set[str]
) -> None:
    """A run would start and end in its first update, or take another kernel than was asked for."""
    config = changed(described(**engine), data=data)
    with pytest.raises(ConfigError, match=f'engine.attention "{engine["attention"]}".*{named}'):
        choose_kernel(config)


def test_documents_and_fp32_have_one_kernel_each(packages: set[str]) -> None:
    """Attention would cross documents, or a run in fp32 would be sent to a kernel that takes bf16 alone."""
    assert choose_kernel(changed(described(), data={"document_mask": True})).kernel == "flex"
    assert choose_kernel(described(precision="fp32")).kernel == "efficient"
