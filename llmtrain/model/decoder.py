"""What is the model? A pre-norm LLaMA decoder (Touvron 2023, arXiv:2302.13971): RMSNorm, rotary positions,
grouped-query attention, SwiGLU, no biases.

Parameter names are final: checkpoints are keyed by them. A module uses only the parameters it owns, inside its own
`forward`, so that engines may shard them by module. Initial values come from `llmtrain.model.initial`, not from here:
build on the meta device, then fill.

Shapes: B sequences, T positions, D hidden size, H heads, G key-value heads, Q head size, F feed-forward size,
V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config import ModelConfig
from llmtrain.model.attention import Documents, OneByOne, attend, documents_for, one_by_one, one_by_one_uncompiled
from llmtrain.model.loss import Head, Reduction
from llmtrain.model.projection import Linear
from llmtrain.model.recompute import Recompute, keeping_products
from llmtrain.model.rope import Rotary


class Decoder(nn.Module):
    """Tokens to logits, or with targets to the negative log-likelihood."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.always_tiled = False  # attention by tiles also where sequences are one document
        self.rotary = Rotary(config)
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, self.rotary) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size)
        self._tie()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """Without `targets` logits (B, T, V), else the summed NLL, or with "none" that of each position (B, T); fp32.

        `tokens`, `targets` and `document_ids` are (B, T) integers. Targets equal to IGNORE count as 0. With
        `document_ids`, which never fall along a sequence, a position sees only earlier ones of the same document.
        """
        self.rotary.prepare(tokens.device)
        if document_ids is None and self.always_tiled:
            document_ids = torch.zeros_like(tokens)
        documents = None if document_ids is None else documents_for(document_ids, self.config.head_size)
        x = self.embed(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, documents)
        logits_or_loss: Tensor = self.head(self.norm(x), targets, reduction)
        return logits_or_loss

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.register_parameter("weight", self.embed.get_parameter("weight"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        # to(), to_empty() and the like may replace each module's parameters one by one, which would part the tie.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    `recompute` says what the backward pass computes again instead of keeping it. That, like compilation, happens inside
    `forward`: hooks on the block stay outside and parameter names stay as they are. Nothing in a block is random, so
    there is no random state to keep.
    """

    def __init__(self, config: ModelConfig, rotary: Rotary) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, rotary)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = FeedForward(config)

    def compile_body(self) -> None:
        """Compile what `forward` computes, for each shape apart, so that no shape's kernels depend on earlier ones."""
        self._body = torch.compile(self._body, dynamic=False)  # type: ignore[method-assign]
        self.attention.one_by_one = one_by_one_uncompiled()

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        if self.recompute == "all" and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._body, x, documents, use_reentrant=False, preserve_rng_state=False)
            return out
        return self._body(x, documents)

    def _body(self, x: Tensor, documents: Documents | None) -> Tensor:
        if self.recompute == "cheap" and torch.is_grad_enabled():
            out: Tensor = checkpoint(
                self._layers,
                x,
                documents,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=keeping_products,
            )
            return out
        return self._layers(x, documents)

    def _layers(self, x: Tensor, documents: Documents | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), documents)  # (B, T, D)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, rotary: Rotary) -> None:
        super().__init__()
        self.rotary = rotary
        self.head_size = config.head_size
        self.one_by_one: OneByOne = one_by_one
        kv_size = config.num_kv_heads * config.head_size
        self.wq = Linear(config.hidden_size, config.hidden_size)
        self.wk = Linear(config.hidden_size, kv_size)
        self.wv = Linear(config.hidden_size, kv_size)
        self.wo = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, documents: Documents | None) -> Tensor:
        q = self.rotary(self.wq(x).unflatten(-1, (-1, self.head_size))).transpose(1, 2)  # (B, H, T, Q)
        k = self.rotary(self.wk(x).unflatten(-1, (-1, self.head_size))).transpose(1, 2)  # (B, G, T, Q)
        v = self.wv(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (B, G, T, Q)
        out = attend(q, k, v, documents, self.one_by_one).transpose(1, 2).flatten(2)  # (B, T, D)
        projected: Tensor = self.wo(out)
        return projected


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate = Linear(config.hidden_size, config.ffn_size)
        self.w_up = Linear(config.hidden_size, config.ffn_size)
        self.w_down = Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))  # (B, T, F) within
        return out


class Embedding(nn.Module):
    """A row for each token. It owns `weight` (V, D) and leaves it unset, as all modules here do."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)  # (B, T, D)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467), statistics in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
