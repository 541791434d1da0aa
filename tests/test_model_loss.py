"""The chunked head against plain fp32 cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.model import loss as loss_module
from llmtrain.model import precision
from llmtrain.model.loss import IGNORE, Head, chunk_tokens

B, T, D, V = 2, 37, 48, 211


@pytest.fixture(params=[7, 64, 10_000], ids=["ragged_tail", "two_chunks", "one_chunk"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda *_: request.param)


def head(dtype=torch.float32):
    head = Head(D, V)
    torch.nn.init.normal_(head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return head.to(dtype)


def inputs(ignored, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    if ignored == "some":
        targets[torch.rand(B, T, generator=generator) < 0.3] = IGNORE
    elif ignored == "all":
        targets[:] = IGNORE
    return hidden, targets


def plain(hidden, weight, targets, reduction="sum"):
    """The slow obvious loss: all logits at once, in fp32."""
    logits = F.linear(hidden.float(), weight.float()).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction=reduction)


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_value_and_gradients_equal_plain_cross_entropy(chunked, ignored):
    """The chunked loss would train on something else than the cross-entropy."""
    layer = head()
    hidden, targets = inputs(ignored)
    expected = plain(hidden, layer.weight, targets)
    count = max(1, int((targets != IGNORE).sum()))
    expected_grads = torch.autograd.grad(expected / count, (hidden, layer.weight))
    loss = layer(hidden, targets)
    grads = torch.autograd.grad(loss / count, (hidden, layer.weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for gradient, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-6)
    if ignored == "all":
        assert loss == 0 and not any(gradient.any() for gradient in grads)


def test_ignored_positions_get_no_gradient(chunked):
    """Padding would push the weights."""
    hidden, targets = inputs("some")
    head()(hidden, targets).backward()
    assert not hidden.grad[targets == IGNORE].any()
    assert hidden.grad[targets != IGNORE].any(dim=-1).all()


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_each_position_has_its_loss(chunked, ignored):
    """Reports per position would not add up to the loss."""
    layer = head()
    hidden, targets = inputs(ignored)
    with torch.no_grad():
        each = layer(hidden, targets, reduction="none")
        total = layer(hidden, targets)
        expected = plain(hidden, layer.weight, targets, "none").view(B, T)
    assert each.dtype == torch.float32
    torch.testing.assert_close(each, expected, rtol=1e-6, atol=1e-6)
    assert each.sum() == total


def test_loss_is_the_same_with_and_without_gradients():
    """Validation of the training batch would differ from the training loss."""
    layer = head()
    hidden, targets = inputs("some")
    with_gradients = layer(hidden, targets)
    with torch.no_grad():
        assert layer(hidden, targets) == with_gradients


@pytest.mark.parametrize("native", [True, False], ids=["native", "widened"])
def test_bf16_head_loses_no_more_than_bf16_rounding(chunked, native, monkeypatch):
    """bf16 runs would have a loss or gradients of lower precision than their weights."""
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", native)
    layer = head(torch.bfloat16)
    hidden, targets = inputs("some", torch.bfloat16)
    expected = plain(hidden, layer.weight, targets)
    expected_grads = torch.autograd.grad(expected, (hidden, layer.weight))
    loss = layer(hidden, targets)
    grads = torch.autograd.grad(loss, (hidden, layer.weight))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-3 if native else 1e-6, atol=0)
    for gradient, reference in zip(grads, expected_grads, strict=True):
        assert gradient.dtype == torch.bfloat16
        error = (gradient.float() - reference.float()).norm() / reference.float().norm()
        assert error < (1e-2 if native else 4e-3)


def test_extreme_logits_stay_finite():
    """A confident model would overflow."""
    layer = head()
    hidden, targets = inputs("some")
    with torch.no_grad():
        hidden *= 1e3
    expected = plain(hidden, layer.weight, targets)
    loss = layer(hidden, targets)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert hidden.grad.isfinite().all() and layer.weight.grad.isfinite().all()


def test_other_uses_of_the_weight_add_their_gradient():
    """A tied embedding would lose one of its two gradients."""
    layer = head()
    hidden, targets = inputs("some")
    (grad,) = torch.autograd.grad(layer(hidden, targets), layer.weight)
    (both,) = torch.autograd.grad(layer(hidden, targets) + 3 * layer.weight.sum(), layer.weight)
    torch.testing.assert_close(both, grad + 3)


def test_a_frozen_weight_still_passes_the_gradient_on():
    """Fine-tuning with a frozen head would stop all learning below it."""
    layer = head()
    hidden, targets = inputs("some")
    (expected,) = torch.autograd.grad(layer(hidden, targets), hidden)
    layer.weight.requires_grad_(False)
    layer(hidden, targets).backward()
    assert torch.equal(hidden.grad, expected)


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 32000), (2048, 4096), (16384, 32000), (5, 2**25), (0, 10)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_are_even_and_bounded(tokens, vocab, device):
    """The head's memory would grow with the batch, or a tiny last chunk would waste time."""
    size = chunk_tokens(tokens, vocab, device)
    limit = {"cpu": 2**23, "cuda": 2**27}[device]
    assert size >= 1
    assert size == 1 or size * vocab <= limit
    if tokens:
        chunks = -(-tokens // size)
        assert size - tokens / chunks < 1 + tokens / chunks**2


@pytest.mark.parametrize("native", [True, False], ids=["bf16_instructions", "without"])
def test_autocast_does_not_round_logits(chunked, monkeypatch, native):
    """ZeRO-0 in bf16 would train on a loss of rounded logits, unlike every other engine."""
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", native)
    met = []

    def product(a, b):  # as on a GPU: operands as they come, the result in fp32
        met.append((a.dtype, b.dtype, torch.is_autocast_enabled("cpu")))
        return a.float() @ b.float()

    monkeypatch.setattr(loss_module, "_product", product)
    layer = head()
    hidden, targets = inputs("some")
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(hidden, targets)
    grads = torch.autograd.grad(loss, (hidden, layer.weight))
    rounded = hidden.detach().bfloat16().float().requires_grad_(), layer.weight.detach().bfloat16().requires_grad_()
    expected = plain(*rounded, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    operands = torch.bfloat16 if native else torch.float32  # widened from bf16, where bf16 is slow
    assert set(met) == {(operands, operands, False)}
    assert [gradient.dtype for gradient in grads] == [torch.float32, torch.float32]
    for gradient, reference in zip(grads, torch.autograd.grad(expected, rounded), strict=True):
        assert (gradient - reference).norm() < 0.01 * reference.norm()
