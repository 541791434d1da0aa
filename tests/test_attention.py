"""Attention within documents against a dense mask of T x T: on a CPU, on a GPU, and in a GPU's arithmetic on a CPU."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from llmtrain.config import Config, ModelConfig
from llmtrain.data.batches import Batch, _batch
from llmtrain.distributed import open_world
from llmtrain.engines import build_engine
from llmtrain.model import attention, decoder
from llmtrain.model.attention import TILE, attend, causal, document_lengths, one_by_one, tiles
from llmtrain.model.decoder import Decoder
from llmtrain.model.initial import initial_slice
from llmtrain.planner.activations import block_bytes, document_bytes
from llmtrain.train.start import InitialValues
from tests import ranks
from tests.ledger import LAYOUTS, Ledger, run_config

EOS = 7
WITH_MASK = {
    "path": "data/none",
    "tokenizer": {"kind": "sentencepiece", "vocab_size": 300},
    "document_mask": True,
}
Losses = tuple[float, dict[str, Tensor]]


def documents(T: int, *ends: list[int]) -> Tensor:
    """Numbers of the documents as batches have them, a sequence for each list of positions that hold the EOS."""
    tokens = np.zeros((len(ends), T), dtype=np.int64)
    for row, at in enumerate(ends):
        tokens[row, at] = EOS
    ids = _batch(tokens, tokens, EOS).document_ids
    assert ids is not None
    return ids


# One document, only documents of a token, and ends before, on and after the edges of tiles and of the sequence.
CASES = {
    "shorter than a tile": documents(90, [], [0, 1, 2, 40], list(range(90)), [88, 89]),
    "whole tiles": documents(3 * TILE, [], [TILE - 2, TILE - 1], [TILE, 2 * TILE - 1], list(range(3 * TILE))),
    "a broken tile": documents(2 * TILE + 44, [], [10, 200], [TILE - 1, 2 * TILE - 1], [2 * TILE + 42, 2 * TILE + 43]),
}


def dense_mask(ids: Tensor) -> Tensor:
    """Every pair of positions looked at. (B, T) to (B, 1, T, T)."""
    return (ids.unsqueeze(2) == ids.unsqueeze(1)).tril().unsqueeze(1)


def dense(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *ways: Any) -> Tensor:
    """The reference: a mask of T x T, and heads of keys and values repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(ids))


def projections(B: int, T: int, G: int, Q: int = 16) -> list[Tensor]:
    """Queries, keys and values of size Q as blocks make them: 4 heads, and G of keys and values."""
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(B, T, heads, Q, generator=generator).transpose(1, 2).requires_grad_() for heads in (4, G, G)]


@pytest.fixture
def tiled_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    put_tiles_on_cpu(monkeypatch)


def put_tiles_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's own arithmetic on a CPU, gradients included, which it refuses because it has no fast kernel."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention, "_compiled_alone", lambda: flex.flex_attention)
    monkeypatch.setattr(decoder, "documents_for", lambda ids, head_size: tiles(ids))


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["one by one", "tiles"])
def test_attention_and_its_gradient_are_those_of_a_dense_mask(
    way: str, name: str, heads: int, tiled_on_cpu: None
) -> None:
    """A model would learn from neighbours in the sequence, or be blind to its own document."""
    ids = CASES[name]
    given = q, k, v = projections(len(ids), ids.shape[1], heads)
    found = attend(q, k, v, tiles(ids) if way == "tiles" else ids, causal, one_by_one)
    wanted = dense(q, k, v, ids)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found, given, weights), torch.autograd.grad(wanted, given, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("heads", [4, 2])
def test_a_sequence_of_one_document_is_attended_to_as_without_documents(heads: int) -> None:
    """Switching the mask on would change, by rounding at least, runs whose sequences hold a single document."""
    q, k, v = projections(2, 300, heads)
    one = torch.zeros((2, 300), dtype=torch.int32)
    apart = [attend(q[row], k[row], v[row], None, causal, one_by_one) for row in (slice(0, 1), slice(1, 2))]
    assert torch.equal(attend(q, k, v, one, causal, one_by_one), torch.cat(apart))


def test_lengths_are_of_documents_within_their_sequence() -> None:
    """A document at the end of one sequence would see the first of the next."""
    ids = torch.tensor([[0, 0, 1, 2], [2, 2, 2, 3], [0, 0, 0, 0]], dtype=torch.int32)
    assert document_lengths(ids) == [2, 1, 1, 3, 1, 4]


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_those_that_looking_at_every_pair_finds(name: str) -> None:
    """A GPU would skip tiles that a document spans, or see whole tiles that it spans in part."""
    ids = CASES[name]
    B, T = ids.shape
    made = tiles(ids)
    looked = create_block_mask(made.mask_mod, B, None, T, T, device="cpu")
    assert torch.equal(create_mask(made.mask_mod, B, 1, T, T, device="cpu"), dense_mask(ids))
    assert made.shape == looked.shape == (B, 1, T, T) and made.BLOCK_SIZE == looked.BLOCK_SIZE
    for ours, theirs in zip(tables(made), tables(looked), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def tables(mask: BlockMask) -> list[Tensor]:
    """What kernels read of `mask`."""
    found = [
        getattr(mask, f"{kind}{side}_{what}")
        for kind in ("", "full_")
        for side in ("kv", "q")
        for what in ("num_blocks", "indices")
    ]
    assert all(isinstance(table, Tensor) for table in found)
    return found


def test_tiles_are_made_without_looking_at_every_pair_and_are_as_large_as_planned() -> None:
    """A long sequence would not fit because of a mask, or a plan would count a mask that is not there."""
    ids = documents(8192, list(range(100, 8192, 100)), [5000])
    with Ledger((0, 0)) as ledger:
        before = ledger.now
        made = tiles(ids)
        assert ledger.peak - before < 8192**2 / 50
    held = sum(table.untyped_storage().nbytes() for table in tables(made)) + ids.untyped_storage().nbytes()
    config = run_config("llama3-8b", {"kind": "single"}, 1, 2, 8192, data=WITH_MASK)
    assert held == document_bytes(config)
    plain = run_config("llama3-8b", {"kind": "single"}, 1, 2, 8192)
    assert block_bytes(config) == block_bytes(plain) and document_bytes(plain) == 0


@pytest.mark.parametrize("heads", [4, 2])
def test_on_a_cpu_documents_keep_what_was_planned(heads: int) -> None:
    """The largest micro-batch said to fit would run out of memory."""
    shape = {"preset": "tiny", "num_kv_heads": heads}
    plain = run_config("tiny", {"kind": "single", "precision": "fp32"}, 1, 2, 260, model=shape)
    config = run_config("tiny", {"kind": "single", "precision": "fp32"}, 1, 2, 260, model=shape, data=WITH_MASK)
    ids = documents(260, list(range(49, 260, 50)), [])

    def kept(given: Tensor | None) -> int:
        q, k, v = projections(2, 260, heads, config.model.head_size)
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attend(q, k, v, given, causal, one_by_one).transpose(1, 2).flatten(2)
            projected = out @ torch.ones(out.shape[-1], 1, requires_grad=True)
        assert projected.shape == (2, 260, 1)
        return sum(found.values())

    extra = block_bytes(config, "cpu") - block_bytes(plain, "cpu")
    assert extra > 0 and kept(ids) - kept(None) == pytest.approx(extra, rel=0.05)


def small(**changes: Any) -> ModelConfig:
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 100}
    return ModelConfig(**{**shape, "vocab_size": 301, "max_seq_len": 2 * TILE + 44, **changes})


def built(config: ModelConfig, device: str = "cpu", seed: int = 1) -> Decoder:
    """A decoder with initial values, built the way the engines do it."""
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = initial_slice(config, name, 0, parameter.numel(), seed)
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))
    return model


def micro_batch(config: ModelConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and document numbers of two sequences, with about ten documents each."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(config.vocab_size, size=(2, config.max_seq_len + 1))
    rows[rng.random(rows.shape) < 0.03] = EOS
    made = _batch(rows[:, :-1].copy(), rows[:, 1:].copy(), EOS)
    assert made.document_ids is not None
    return made.tokens, made.targets, made.document_ids


def losses(model: Decoder, *given: Tensor) -> Losses:
    """The mean loss of a micro-batch and its gradients, by parameter."""
    loss = model(*given) / given[0].numel()
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_losses(found: Losses, wanted: Losses) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


def by_a_dense_mask(monkeypatch: pytest.MonkeyPatch, model: Decoder, *given: Tensor) -> Losses:
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "documents_for", lambda ids, head_size: ids)
        patched.setattr(decoder, "attend", dense)
        return losses(model, *given)


def compiled_without_kernels(monkeypatch: pytest.MonkeyPatch, model: Decoder) -> None:
    """Compile all blocks, to what torch computes eagerly: traced and guarded as ever, but quickly."""
    whole: Callable[..., Any] = torch.compile
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", partial(whole, backend="aot_eager"))
        for block in model.blocks:
            assert isinstance(block, decoder.Block)
            block.compile_body()


@pytest.mark.parametrize(("compiled", "recompute"), [(False, False), (True, True)])
@pytest.mark.parametrize("way", ["one by one", "tiles"])
@pytest.mark.filterwarnings("ignore")  # torch's compiler causes warnings of torch while it traces
def test_a_model_trains_as_with_a_dense_mask_and_new_documents_compile_nothing(
    way: str, compiled: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Losses would depend on the device, or every update would wait for a compiler until it gives up."""
    config = small()
    batches = [micro_batch(config, seed) for seed in range(3)]
    reference = built(config)
    wanted = [by_a_dense_mask(monkeypatch, reference, *given) for given in batches]
    if way == "tiles":
        request.getfixturevalue("tiled_on_cpu")
    model = built(config)
    for block in model.blocks:
        assert isinstance(block, decoder.Block)
        block.recompute = "all" if recompute else "none"
    if compiled:
        request.addfinalizer(torch._dynamo.reset)
        compiled_without_kernels(monkeypatch, model)
        of_one_block = built(small(num_layers=1))
        of_one_block.blocks[0].recompute = "all" if recompute else "none"
        compiled_without_kernels(monkeypatch, of_one_block)
        losses(of_one_block, *batches[0])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_equal_losses(losses(model, *batches[0]), wanted[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "each block was compiled apart"
    with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
        for given, expected in zip(batches[1:], wanted[1:], strict=True):
            assert_equal_losses(losses(model, *given), expected)


def one_update(kinds: list[str], output: Path) -> None:
    """On both ranks, the loss and gradient norm of each engine's first update, both ways of attending."""
    found = {}
    with open_world(120, collectives=True) as world:
        for kind in kinds:
            for way in ("one by one", "tiles"):
                config = sharded(kind)
                batches = [Batch(*(x[world.rank :: 2] for x in micro_batch(config.model, seed))) for seed in (0, 1)]
                with pytest.MonkeyPatch.context() as patched:
                    if way == "tiles":
                        put_tiles_on_cpu(patched)
                    engine = build_engine(config, world)
                    engine.load(InitialValues(config), 0)
                    stats = engine.train_step(batches, 1.0)
                found[f"{kind}, {way}"] = (stats.loss.item(), stats.grad_norm.item())
        (output / f"{world.rank}.json").write_text(json.dumps(found))


def sharded(kind: str) -> Config:
    """A run on two ranks, where every block is computed again in the backward pass."""
    engine = {**LAYOUTS[f"{kind} fp32"], "activation_checkpointing": "all"}
    shape = small().model_dump(mode="json", exclude_none=True)
    return run_config("tiny", engine, 2, 1, shape["max_seq_len"], model=shape, data=WITH_MASK)


def test_sharded_engines_train_as_with_a_dense_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks are given would not survive the hooks of FSDP2 or ZeRO-3."""
    kinds = ["fsdp", "zero 3"]
    ranks.start(tmp_path / "logs", 2, one_update, kinds, tmp_path).succeeded()
    config = sharded("fsdp")
    model = built(config.model, seed=config.run.seed)
    batches = [micro_batch(config.model, seed) for seed in (0, 1)]
    together = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    loss, gradients = by_a_dense_mask(monkeypatch, model, *together)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(found) == [f"{kind}, {way}" for kind in kinds for way in ("one by one", "tiles")]
        for name, (their_loss, their_norm) in found.items():
            assert their_loss == pytest.approx(loss, abs=1e-5), name
            assert their_norm == pytest.approx(norm, rel=1e-4), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_trains_as_with_a_dense_mask(compiled: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses on a GPU would be of another model, or every update would wait for a compiler."""
    config = small()
    model, reference = built(config, "cuda"), built(config, "cuda")
    for block in model.blocks:
        assert isinstance(block, decoder.Block)
        block.recompute = "all" if recompute else "none"
        if compiled:
            block.compile_body()
    for seed in range(3):
        given = [x.to("cuda") for x in micro_batch(config, seed)]
        assert isinstance(attention.documents_for(given[2], config.head_size), BlockMask)
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            found = losses(model, *given)
        assert_equal_losses(found, by_a_dense_mask(monkeypatch, reference, *given))
        with torch.no_grad():
            assert model(*given).item() / given[0].numel() == pytest.approx(found[0], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_nothing_of_t_squared_and_takes_small_heads() -> None:
    """A long sequence would not fit for its mask, or a model with tiny heads would not start."""
    config = small(max_seq_len=16384, num_layers=1)
    model = built(config, "cuda")
    given = [x.to("cuda") for x in micro_batch(config, 0)]
    model(*given).backward()
    torch.cuda.reset_peak_memory_stats()
    model(*given).backward()
    assert torch.cuda.max_memory_allocated() < 2 * 16384**2
    tiny = small(num_heads=8, num_kv_heads=8)
    assert tiny.head_size < attention.SMALLEST_TILED_HEAD
    built(tiny, "cuda")(*(x.to("cuda") for x in micro_batch(tiny, 0))).backward()
