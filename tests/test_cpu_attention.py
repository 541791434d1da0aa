"""fp32 attention on a CPU leaves `medium`, and is torch's attention to the last bit.

This CPU is told that `medium` reaches it. Where it does not, the kernel gives the same bits under every setting, so
that equality is exact; where it does, the reference is torch's attention under "highest".
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model import cpu_attention, precision
from llmtrain.model.attention import causal, one_by_one
from llmtrain.model.decoder import Decoder
from llmtrain.model.initial import initial_slice
from tests.test_attention import small

SHAPES = [(2, 300, 4, 16), (2, 300, 2, 16), (1, 1, 1, 3), (2, 64, 2, 5), (1, 513, 4, 64), (3, 33, 1, 256)]
Spied = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def medium_reaches_this_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    """Which of torch's kernels is called, and the precision of products while it is."""
    found: Spied = []

    def watch(name: str) -> None:
        kernel: Callable[..., Any] = getattr(cpu_attention, name)

        def called(*given: Any, **named: Any) -> Any:
            found.append((name, in_force()))
            return kernel(*given, **named)

        monkeypatch.setattr(cpu_attention, name, called)

    watch("_forward")
    watch("_backward")
    return found


def in_force() -> str:
    """In what oneDNN, which alone reads it on a CPU, computes fp32 products now."""
    found: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return found


def projections(B: int, T: int, G: int, Q: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(B, T, heads, Q, generator=generator).transpose(1, 2).requires_grad_() for heads in (4, G, G)]


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference, under "highest" forward and backward where the caller keeps it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_are_torchs_to_the_last_bit(
    shape: tuple[int, int, int, int], weighted: bool, spied: Spied
) -> None:
    """A run would compute something else on a CPU with AVX-512 than torch's own attention does."""
    given = projections(*shape)
    weights = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(2))

    def results(attention: Callable[..., Tensor]) -> list[Tensor]:
        out = attention(*given)
        total = (out * weights).sum() if weighted else out.sum()  # the gradient of a sum has strides of 0
        return [out, *torch.autograd.grad(total, given)]

    found = results(causal)
    with cpu_attention.plain_fp32():
        wanted = results(torchs)
    assert [name for name, _ in spied] == ["_forward", "_backward"]
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_it_is_kept_from_medium_which_holds_before_between_and_after(spied: Spied) -> None:
    """Short sequences would train several times slower, or the products of all later updates in slower arithmetic."""
    given = projections(2, 64, 2, 16)
    assert in_force() == "bf16"
    out = causal(*given)
    assert in_force() == "bf16" and torch.get_float32_matmul_precision() == "medium"
    torch.autograd.grad(out.sum(), given)
    assert in_force() == "bf16" and torch.get_float32_matmul_precision() == "medium"
    assert spied == [("_forward", "ieee"), ("_backward", "ieee")]


def test_each_document_is_kept_from_medium(spied: Spied) -> None:
    """`data.document_mask` would make short documents several times slower."""
    given = q, k, v = projections(1, 12, 4, 16)
    torch.autograd.grad(one_by_one(q, k, v, torch.arange(12).unsqueeze(0) // 4).sum(), given)
    assert spied == 3 * [("_forward", "ieee")] + 3 * [("_backward", "ieee")]


@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_an_error_within_leaves_the_precision_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After memory ran out once, and a smaller micro-batch was tried, all products would be slower."""

    def fails(*given: Any, **named: Any) -> None:
        raise MemoryError(in_force())

    monkeypatch.setattr(cpu_attention, name, fails)
    given = projections(1, 8, 4, 16)
    with pytest.raises(MemoryError, match="ieee"):
        torch.autograd.grad(causal(*given).sum(), given)
    assert in_force() == "bf16"


def test_what_is_not_fp32_or_not_for_the_kernel_goes_torchs_way(spied: Spied, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 runs, CPUs that `medium` does not reach, or unusual strides would change, fail or pay for nothing."""
    given = projections(2, 16, 2, 8)
    causal(*(x.bfloat16() for x in given))
    with torch.autocast("cpu", torch.bfloat16):
        assert causal(*given).dtype == torch.bfloat16
    strided = [x.mT.contiguous().mT for x in given]
    assert torch.equal(causal(*strided), torchs(*strided))
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", False)
    assert torch.equal(causal(*given), torchs(*given))
    assert spied == []


class Whole(nn.Module):
    """A product, attention, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(16, 4 * 16 + 2 * 2 * 16, bias=False)
        self.out = nn.Linear(4 * 16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (-1, 16)).transpose(1, 2).split([4, 2, 2], dim=1)
        out: Tensor = self.out(causal(q, k, v).transpose(1, 2).flatten(2))
        return out


@pytest.mark.filterwarnings("ignore")  # torch's compiler causes warnings of torch while it traces
def test_compiled_it_is_one_graph_and_still_kept_from_medium(spied: Spied, request: pytest.FixtureRequest) -> None:
    """`engine.compile` would break each block in three, or attend in what the process multiplies in."""
    request.addfinalizer(torch._dynamo.reset)
    torch.manual_seed(1)
    model, x = Whole(), torch.randn(2, 40, 16)
    weights = list(model.parameters())
    eager = model(x)
    wanted = torch.autograd.grad(eager.sum(), weights)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)  # tracing calls the kernels too, for their shapes
    spied.clear()
    found = compiled(x)
    gradients = torch.autograd.grad(found.sum(), weights)
    assert spied == [("_forward", "ieee"), ("_backward", "ieee")]
    assert torch.equal(found, eager)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, wanted, strict=True))


def losses(recompute: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a small model and its gradients."""
    config = small()
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    for block in model.blocks:
        block.recompute = recompute
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(initial_slice(config, name, 0, p.numel(), 1)).view(p.shape))
    tokens = torch.arange(2 * 60).view(2, 60) % config.vocab_size
    loss = model(tokens, tokens)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_model_trains_the_same_and_cheap_recomputation_keeps_attention(
    spied: Spied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`activation_checkpointing: cheap` would compute attention twice, or other gradients."""
    torch.set_float32_matmul_precision("highest")  # so that torch's own attention is the reference on every CPU
    calls = {}
    found = {}
    for recompute in ("none", "cheap", "all"):
        spied.clear()
        found[recompute] = losses(recompute)
        calls[recompute] = [name for name, _ in spied].count("_forward")
    assert calls == {"none": 2, "cheap": 2, "all": 4}
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", False)
    wanted_loss, wanted = losses("none")
    for loss, gradients in found.values():
        assert torch.equal(loss, wanted_loss) and gradients.keys() == wanted.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())
