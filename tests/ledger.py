"""What does an engine hold, by kind and at most, counted in the storages of live tensors?

The planner's arithmetic (`llmtrain/planner/`) is compared with these counts by `tests/test_plan.py` for small models on
real ranks, and by `tests/benchmarks/memory.py` for the presets.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.config import Config
from llmtrain.config_file import validate
from llmtrain.data.batches import Batch
from llmtrain.distributed import World
from llmtrain.engines.base import prepare_blocks, unmarked
from llmtrain.model import precision
from llmtrain.model.decoder import Decoder
from llmtrain.model.loss import chunk_tokens
from llmtrain.planner import activations, fit, state
from llmtrain.planner.memory import memory
from llmtrain.planner.state import FP32
from llmtrain.train.average import Averaging, build

ACCUMULATION = 2
_VARIANTS: dict[str, dict[str, Any]] = {
    "fsdp, reduced last": {**fit.LAYOUTS["fsdp"], "accumulation_sync": "last"},
    "fsdp, freed": {**fit.LAYOUTS["fsdp"], "reshard_after_forward": True},
    **{
        f"{name}, averaged": {**fit.LAYOUTS[name], "ema_window": "5 steps"}
        for name in ("single", "fsdp", "zero 2", "zero 3")
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    f"{name} {precision}": {**engine, "precision": precision}
    for name, engine in {**fit.LAYOUTS, **_VARIANTS}.items()
    for precision in ("fp32", "bf16")
    if not (("host" in name or "averaged" in name) and precision == "fp32")
}


def run_config(preset: str, engine: dict[str, Any], count: int, micro: int, seq_len: int, **changes: Any) -> Config:
    """A run of `preset` with two micro-batches a rank; `offload.optimizer` in `engine` is one of the section below, and
    `ema_window` one of validation.
    """
    engine = {key: value for key, value in engine.items() if value is not None}
    offload = {key.partition(".")[2]: engine.pop(key) for key in list(engine) if "." in key}
    values: dict[str, Any] = {
        "run": {"name": "planned"},
        "model": {"preset": preset},
        "data": {"path": "data/none", "tokenizer": {"kind": "sentencepiece", "vocab_size": 300}},
        "batch": {"global_sequences": micro * ACCUMULATION * count, "micro": micro, "seq_len": seq_len},
        "schedule": {"name": "cosine", "peak": 1e-3, "horizon": "20 steps"},
        "validation": {"ema_window": engine.pop("ema_window", None)},
        "engine": {**engine, "offload": offload},
        **changes,
    }
    return validate(values, "config")


class Ledger(TorchDispatchMode):
    """Keeps account of every live tensor storage: what there is, what is made, resized and freed inside the block."""

    def __init__(self, wide: tuple[int, int]) -> None:
        super().__init__()
        self.wide = wide  # the shape whose bytes are summed apart: a chunk of logits
        self.held: dict[int, int] = {}
        self.wide_held: dict[int, int] = {}
        self.now = self.peak = self.wide_peak = 0

    def __enter__(self) -> "Ledger":
        self._resize = torch.UntypedStorage.resize_
        ledger = self

        def resize_(storage: Any, size: int) -> Any:
            done = ledger._resize(storage, size)
            if storage._cdata in ledger.held:
                ledger._count(storage._cdata, storage.nbytes())
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        for found in [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]:
            self._note(found)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *ended: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*ended)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return made

    def _note(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            weakref.finalize(storage, self._forget, key)
            if tuple(tensor.shape) == self.wide:
                self.wide_held[key] = storage.nbytes()
                self.wide_peak = max(self.wide_peak, sum(self.wide_held.values()))
        self._count(key, storage.nbytes())

    def _count(self, key: int, size: int) -> None:
        self.now += size - self.held.get(key, 0)
        self.held[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)
        self.wide_held.pop(key, None)


class Constant:
    """Every element of every weight and moment the same."""

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start,), 0.01)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each storage below the tensors."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local if t.device.type != "meta"}


def owned(engine: Any) -> dict[str, int]:
    """Bytes by kind, found through what modules, optimizers and DeepSpeed's attributes refer to; each storage once."""
    averages = engine.averages.values() if isinstance(engine, Averaging) else []
    engine = _innermost(engine)
    zero = getattr(getattr(engine, "engine", None), "optimizer", None)
    module = engine.engine.module if hasattr(engine, "engine") else engine.model
    grouped = [p for group in engine.optimizer.param_groups for p in group["params"]]
    parameters = grouped if isinstance(module, FSDPModule) else list(module.parameters())  # whole while gathered
    masters = next(
        (
            getattr(zero, name)
            for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
            if hasattr(zero, name)
        ),
        grouped,
    )
    buckets = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    found = {
        "bucket": storages(t for buffer in buckets for t in (buffer if isinstance(buffer, list) else [buffer])),
        "weights": storages([*parameters, *(getattr(p, "ds_tensor", None) for p in parameters)]),
        "masters": storages(masters),
        "moments": storages(
            t for s in engine.optimizer.state.values() for k, t in s.items() if k.startswith("exp_avg")
        ),
        "gradients": storages(
            [
                *(p.grad for p in [*parameters, *masters]),
                *(getattr(p, "grad_accum", None) for p in parameters),
                *_whole_gradients(module),
                *getattr(zero, "fp32_groups_gradients_flat", []),
                *(
                    t
                    for name in ("averaged_gradients", "all_grad_tensors")
                    for parts in getattr(zero, name, {}).values()
                    for t in parts or []
                ),
                *getattr(zero, "accumulated_grads_in_cpu", {}).values(),
                getattr(zero, "grad_partitions_flat_buffer", None),
            ]
        ),
        "average": storages(averages),
    }
    seen: set[int] = set()
    totals = {}
    for kind, sizes in found.items():
        totals[kind] = sum(size for key, size in sizes.items() if key not in seen)
        seen |= set(sizes)
    return totals


def _innermost(engine: Any) -> Any:
    return engine.engine if isinstance(engine, Averaging) else engine


def _whole_gradients(module: torch.nn.Module) -> Iterator[torch.Tensor | None]:
    """The gradients that FSDP2 keeps for whole parameters while it does not reduce them."""
    for part in module.modules():
        group = part._get_fsdp_state()._fsdp_param_group if isinstance(part, FSDPModule) else None
        for parameter in group.fsdp_params if group else []:
            yield parameter.unsharded_accumulated_grad
            yield parameter._unsharded_param.grad


def measured(config: Config, world: World) -> dict[str, int]:
    """What the second update of a run holds: before it, when its last micro-batch begins, when the weights change,
    and at most. On every CPU as on one without bf16 instructions, which is what is planned.
    """
    precision.CPU_MULTIPLIES_BF16 = False
    engine: Any = build(config, world)
    engine.load(Constant(), 0)
    micro, seq_len, vocab = config.batch.micro, config.batch.seq_len, config.model.vocab_size
    short, whole = (Batch(*torch.ones((2, micro, length), dtype=torch.long)) for length in (4, seq_len))
    engine.train_step([short] * ACCUMULATION, 1.0)
    gc.collect()
    found = {f"always {kind}": count for kind, count in owned(engine).items()}
    before = sum(found.values())

    def note(moment: str) -> None:
        found.update({f"{moment} {kind}": count for kind, count in owned(engine).items()})

    def phase(name: str) -> AbstractContextManager[None]:
        if name == "forward":
            note("forward")
        return unmarked(name)

    inner = _innermost(engine)
    step, inner.phase = inner.optimizer.step, phase

    def counted(*arguments: Any, **options: Any) -> Any:
        if "update weights" not in found:
            note("update")
        return step(*arguments, **options)

    inner.optimizer.step = counted
    with Ledger((chunk_tokens(micro * seq_len, vocab, "cpu"), vocab)) as ledger:
        elsewhere = ledger.now - before
        engine.train_step([whole] * ACCUMULATION, 1.0)
    inner.optimizer.step = step
    return {**found, "logits": ledger.wide_peak, "peak": ledger.peak - elsewhere}


def planned(config: Config, count: int) -> dict[str, int]:
    """What `measured` should find on the rank that holds most, where weights do not move."""
    held, most = state.holdings(config, count, "cpu"), memory(config, count, "cpu")
    found = {}
    for kind in ("weights", "masters", "moments", "gradients"):
        always = held.always.get(kind, 0) + held.host.get(kind, 0)
        found[f"always {kind}"] = always
        if kind != "weights":  # ZeRO-3 and FSDP2 gather them in the forward pass; ZeRO-3 lets go of them in the update
            found[f"forward {kind}"] = always + held.forward.get(kind, 0)
            found[f"update {kind}"] = always + held.update.get(kind, 0)
    found["always average"] = most.kinds["average"] + most.host.get("average", 0)
    found["logits"] = activations.micro_batch(config, "cpu").forward["logits"]
    return {**found, "peak": most.total}


def kept_for_backward(config: Config) -> tuple[int, int]:
    """Bytes that one micro-batch leaves for its backward pass, measured and planned, on one device in fp32."""
    micro, seq_len, D = config.batch.micro, config.batch.seq_len, config.model.hidden_size
    with torch.device("meta"):
        model = Decoder(config.model)
    model = model.to_empty(device="cpu")
    prepare_blocks(model, config, torch.device("cpu"))
    tokens = torch.zeros((micro, seq_len), dtype=torch.long)
    with mock.patch("torch.nn.functional.rms_norm", KeepsItsInput.apply):
        model(tokens, tokens)  # makes the tables of the rotary embedding
        with Ledger((0, 0)) as ledger:
            before = ledger.now
            loss = model(tokens, tokens)
            kept = ledger.now - before
    del loss
    head = FP32 * D * (config.model.vocab_size + 2 * micro * seq_len)  # its gradients, and the last norm's input
    return kept, activations.micro_batch(config, "cpu").backward["activations"] + head


class KeepsItsInput(torch.autograd.Function):
    """A norm that keeps what the fused kernel of a GPU keeps: its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rate = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, rate, weight)
        normed: torch.Tensor = x * rate * weight
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        raise NotImplementedError
