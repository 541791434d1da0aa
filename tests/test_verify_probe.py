"""Where a machine does not compute the same twice, `verify-resume` names the module that gives other bits."""

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from llmtrain.config_file import to_yaml, validate
from llmtrain.errors import EnvironmentError
from llmtrain.model.initial import parameter_shapes
from llmtrain.train import verify as module
from llmtrain.train.verify import Layout, Leg
from llmtrain.train.verify_probe import BACKWARD, FORWARD, RECOMPUTED, Probed, first_difference
from tests import ranks
from tests.test_verify import call, forked, verified

ENTROPY: Callable[[], int] = lambda: int.from_bytes(os.urandom(4), "little")  # noqa: E731 - replaced by a fault


def nudged(values: Tensor) -> Tensor:
    """The values, some of them off by the last bit of bf16, which ones being a matter of chance."""
    chosen = torch.from_numpy(np.random.default_rng(ENTROPY()).random(tuple(values.shape)) < 0.5)
    return torch.where(chosen, values * (1 + 2**-7), values)


class Nudge(torch.autograd.Function):
    """The identity, whose gradient differs each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return nudged(gradient)


def plant(fault: str) -> None:
    """Let one kernel of this process sum in another order each time."""
    from llmtrain.model import attention, decoder, projection
    from llmtrain.train import verify_probe

    if fault == "sums in products":
        add = projection.add_weight_gradient
        projection.add_weight_gradient = lambda total, gradient, x: add(total, nudged(gradient), x)  # type: ignore
        verify_probe.sums_in_products = lambda device: True  # as on a GPU
    build = decoder.Decoder.__init__

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.causal(Nudge.apply(q), k, v)  # type: ignore[no-untyped-call]

    def built(model: decoder.Decoder, *arguments: Any) -> None:
        build(model, *arguments)
        first, second = model.blocks[0], model.blocks[1]
        assert isinstance(first, decoder.Block)
        assert isinstance(second, decoder.Block)
        if fault.startswith("attention backward"):
            second.attention.whole = attend
        elif fault == "product forward":
            multiply = first.ffn.w_up.forward
            first.ffn.w_up.forward = lambda x: nudged(multiply(x))  # type: ignore[method-assign]
        elif fault == "product's weight gradient":
            weigh = first.ffn.w_down.forward

            def forward(x: Tensor) -> Tensor:
                linear = first.ffn.w_down
                kept, linear._parameters["weight"] = linear.weight, Nudge.apply(linear.weight)  # type: ignore
                try:
                    return weigh(x)
                finally:
                    linear._parameters["weight"] = kept

            first.ffn.w_down.forward = forward  # type: ignore[method-assign]
        elif fault == "embedding's scatter":
            model.embed.forward = lambda tokens: torch.nn.functional.embedding(  # type: ignore[method-assign]
                tokens,
                Nudge.apply(model.embed.weight),  # type: ignore[no-untyped-call]
            )

    decoder.Decoder.__init__ = built  # type: ignore[method-assign]
    if fault.endswith("by process"):
        globals()["ENTROPY"] = os.getpid
    torch.compile = lambda function, **_: function  # type: ignore[assignment]


def faulty(fault: str, main: str, words: list[str]) -> None:
    """One rank of a leg or a probe, with a fault."""
    plant(fault)
    import_module(main).main(words)


def breaking(fault: str) -> Callable[[Leg], None]:
    def launch(leg: Leg) -> None:
        ranks.start(leg.out / "logs", leg.ranks, faulty, fault, leg.module, leg.words).succeeded()

    return launch


def probed(prepared: dict[str, Any], folder: Path, fault: str, engine: dict[str, Any]) -> Probed:
    """What two processes with this fault, or none, tell of it."""
    config = validate({**prepared, "engine": {**prepared["engine"], **engine}}, "test")
    path = folder / "probe.yaml"
    path.write_text(to_yaml(config))
    outs = [folder / "one", folder / "two"]
    for out in outs:
        out.mkdir()
        words = [str(path), str(out)]
        ranks.start(out / "logs", 1, faulty, fault, "llmtrain.train.verify_probe", words).succeeded()
    return first_difference(outs, alone=True, compiled=config.engine.compile)


@pytest.mark.parametrize(
    ("fault", "engine", "name", "where"),
    [
        ("attention backward", {}, "blocks.1.attention", BACKWARD),
        ("attention backward", {"precision": "bf16"}, "blocks.1.attention", BACKWARD),
        ("attention backward", {"activation_checkpointing": "all"}, "blocks.1.attention", BACKWARD),
        ("attention backward", {"activation_checkpointing": "cheap"}, "blocks.1.attention", BACKWARD),
        ("attention backward", {"compile": True}, "blocks.1", BACKWARD),
        ("product forward", {}, "blocks.0.ffn.w_up", FORWARD),
        ("product's weight gradient", {}, "blocks.0.ffn.w_down", BACKWARD),
        ("sums in products", {"precision": "bf16"}, "blocks.1.ffn.w_down", BACKWARD),
        ("embedding's scatter", {}, "embed", BACKWARD),
    ],
)
def test_the_module_is_named(
    prepared: dict[str, Any], tmp_path: Path, fault: str, engine: dict[str, Any], name: str, where: str
) -> None:
    """A user would look for the kernel in a model of a hundred modules, or in the wrong one of them."""
    found = probed(prepared, tmp_path, fault, engine)
    assert (found.module, found.where) == (name, where), found
    kind = " (compiled)" if engine.get("compile") else ""
    assert found.said == f"the first module to differ is {name}{kind}, in the {where}"


def test_a_choice_made_once_a_process_is_told_apart(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A kernel that the compiler chose by the clock is the same within a process: the probe would find nothing."""
    found = probed(prepared, tmp_path, "attention backward by process", {})
    assert found.module == "blocks.1.attention"
    assert found.said.endswith("in the backward pass, from one process to another")


def test_a_sound_model_is_not_blamed(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user would replace a kernel where the optimizer, or what is between devices, differs."""
    engine = {"activation_checkpointing": "all", "precision": "bf16"}
    found = probed(prepared, tmp_path, "none", engine)
    assert (found.module, found.where) == (None, None), found
    assert found.said == "all modules gave the same bits in 6 passes: it comes from the optimizer"
    together = first_difference([tmp_path / "one", tmp_path / "two"], alone=False, compiled=False)
    assert together.said.endswith("it comes from what is between devices, or from the optimizer")
    seen = json.loads((tmp_path / "one/passes.jsonl").read_text().splitlines()[0])
    assert {where for _, where, _, _ in seen} == {FORWARD, BACKWARD, RECOMPUTED}
    gradients = {what.removeprefix("gradient of ") for _, _, what, _ in seen if what.startswith("gradient of ")}
    assert gradients == set(parameter_shapes(validate(prepared, "test").model))


def test_tied_weights_documents_and_autocast_are_probed(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A user of these settings would be told that the probe failed, or that their head is the embedding."""
    settings = {
        **prepared,
        "model": {**prepared["model"], "tie_embeddings": True},
        "data": {**prepared["data"], "document_mask": True},
    }
    engine = {"kind": "deepspeed", "zero_stage": 0, "precision": "bf16"}
    assert probed(settings, tmp_path, "embedding's scatter", engine).module == "embed and head"


@pytest.mark.parametrize("layout", [Layout("single", 1), Layout("fsdp", 2)])
def test_the_verdict_names_the_module(prepared: dict[str, Any], tmp_path: Path, layout: Layout) -> None:
    """A user would know that the machine does not compute the same twice, and not where."""
    found = verified(prepared, tmp_path, layout, launch=breaking("attention backward"))
    assert not found.twice
    assert found.verdict.startswith("DIFFERS: not deterministic even without a resume: ")
    how = ", with the same kernels on one device" if layout.ranks > 1 else ""
    said = f"; the first module to differ is blocks.1.attention, in the backward pass{how}"
    assert found.verdict.endswith(said)
    assert found.as_json()["probe"]["module"] == "blocks.1.attention"
    assert not (tmp_path / "legs/resumed").joinpath("updates_00000.jsonl").exists()


def test_a_probe_that_fails_leaves_the_verdict(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A model that does not fit one device would cost the user what the legs have found."""

    def launch(leg: Leg) -> None:
        if leg.module.endswith("probe"):
            raise EnvironmentError("the probe_1 leg failed: exit code 1; rank_00000.log ends with\nout of memory")
        breaking("attention backward")(leg)

    found = verified(prepared, tmp_path, Layout("single", 1), launch=launch)
    assert found.verdict.startswith("DIFFERS: not deterministic even without a resume: ")
    assert found.verdict.endswith("; which module, could not be found out: out of memory")


@pytest.mark.parametrize("as_configured", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_what_the_legs_ran_with_is_said(
    prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_configured: bool, gpu: bool
) -> None:
    """A user would take a resume for exact that was only so with kernels which the run itself does not use."""
    monkeypatch.setattr(module, "run_processes", forked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(prepared))
    words = ["--at", 1, "--steps", 2, "--keep", tmp_path / "kept", *(["--as-configured"] if as_configured else [])]
    code, text = call(path, *words)
    assert code == 0, text
    *_, before, last = text.splitlines()
    assert last.startswith("VERIFIED ")
    said = (
        "engine.deterministic: false, as configured" if as_configured else "engine.deterministic: true, and the config"
    )
    assert (said in before) == gpu
    leg = yaml.safe_load((tmp_path / "kept/straight/config.yaml").read_text())
    assert leg["engine"]["deterministic"] is not as_configured


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("as_configured", [False, True])
def test_json_says_what_the_legs_ran_with(
    prepared: dict[str, Any], tmp_path: Path, configured: bool, as_configured: bool
) -> None:
    """A script could not tell a run that resumes exactly from one that would with other kernels."""
    engine = {**prepared["engine"], "deterministic": configured}
    words = {"as_configured": as_configured, "at": 1, "steps": 2}
    found = verified({**prepared, "engine": engine}, tmp_path, Layout("single", 1), **words).as_json()
    assert found["deterministic"] is (configured or not as_configured)
    assert (found["note"], found["probe"]) == ("", None)
