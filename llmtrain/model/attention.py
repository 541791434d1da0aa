"""How do positions attend, and how only within their document? Causally, without a matrix of T x T anywhere.

What blocks are given says which positions belong together. On a GPU it is a table of tiles of 128 x 128 positions, made
once a micro-batch, from which FlexAttention (Dong 2024, arXiv:2412.05496) skips what no document spans; new documents
compile nothing anew. On a CPU it is the documents' numbers: there one causal attention a document is the fastest.

Shapes: B sequences, T positions, H heads, G key-value heads, Q head size, N = T / 128 tiles, rounded up.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llmtrain.model.cpu_attention import attend_in_fp32, medium_reaches
from llmtrain.model.precision import autocast_falls_back, needs_widening

TILE = 128
SMALLEST_TILED_HEAD = 16  # FlexAttention has no kernel for smaller heads

Documents = Tensor | BlockMask
Whole = Callable[[Tensor, Tensor, Tensor], Tensor]
OneByOne = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def documents_for(document_ids: Tensor, head_size: int) -> Documents:
    """What `attend` needs to stay within documents, on the device of `document_ids`.

    `document_ids` (B, T) are integers that never fall along a sequence. A new value begins a new document.
    """
    return tiles(document_ids) if document_ids.is_cuda and head_size >= SMALLEST_TILED_HEAD else document_ids


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, whole: Whole, one_by_one: OneByOne) -> Tensor:
    """Causal attention, within `documents` where they are given. (B, H, T, Q) with (B, G, T, Q) twice.

    `whole` attends where a sequence is one document: `causal`, or a kernel that it does not reach. `one_by_one` is the
    function below, or that which compiled blocks need.
    """
    if isinstance(documents, BlockMask):
        fused: Any = flex_attention if torch.compiler.is_compiling() else _compiled_alone()
        tiled: Tensor = fused(q, k, v, block_mask=documents, enable_gqa=_grouped(q, k))
        return tiled
    if autocast_falls_back(q):
        with torch.autocast("cpu", enabled=False):
            return attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), documents, whole, one_by_one)
    dtype = q.dtype
    if needs_widening(q):
        q, k, v = q.float(), k.float(), v.float()
    return (whole(q, k, v) if documents is None else one_by_one(q, k, v, documents)).to(dtype)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position sees itself and all earlier ones. On a CPU fp32 is fp32 here, whatever products are computed in."""
    if medium_reaches(q, k, v):
        return attend_in_fp32(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=_grouped(q, k))


def one_by_one(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> Tensor:
    """`causal` for each document apart."""
    B, H, T, Q = q.shape
    lengths = document_lengths(document_ids)
    documents = zip(*(torch.split(x.transpose(1, 2).flatten(0, 1), lengths) for x in (q, k, v)), strict=True)
    seen = [causal(*(x.transpose(0, 1).unsqueeze(0) for x in document)) for document in documents]  # (1, H, length, Q)
    return torch.cat([x.squeeze(0).transpose(0, 1) for x in seen]).view(B, T, H, Q).transpose(1, 2)


@cache
def one_by_one_uncompiled() -> OneByOne:
    """`one_by_one` for compiled blocks, one for all of them: compiled, it would be compiled again for new lengths."""
    kept: OneByOne = torch.compiler.disable(one_by_one)  # type: ignore[no-untyped-call]
    return kept


def document_lengths(document_ids: Tensor) -> list[int]:
    """The lengths of all documents, sequence after sequence; a document also ends where its sequence does."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    at = begins.flatten().nonzero().flatten()
    lengths: list[int] = at.diff(append=at.new_tensor([document_ids.numel()])).tolist()
    return lengths


def tiles(document_ids: Tensor) -> BlockMask:
    """Which tiles of queries and keys hold a pair of one document, and which hold nothing else. (B, T) to (B, 1, N, N).

    Numbers never fall, so the first and the last of a tile say which documents it holds, and no pair is looked at.
    """
    T = document_ids.shape[1]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    begin = torch.arange(0, T, TILE, device=document_ids.device)  # (N,)
    first, last = document_ids[:, begin], document_ids[:, (begin + TILE - 1).clamp(max=T - 1)]  # (B, N)
    touches = (last.unsqueeze(1) >= first.unsqueeze(2)) & (begin <= begin.unsqueeze(1))  # (B, N, N)
    alone = (first.unsqueeze(1) == last.unsqueeze(2)) & (begin < begin.unsqueeze(1)) & (begin + TILE <= T).unsqueeze(1)
    return BlockMask.from_kv_blocks(
        *_in_order(touches & ~alone), *_in_order(alone), BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(T, T)
    )


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row has chosen, and their numbers, the chosen first. (B, N, N) to (B, 1, N), (B, 1, N, N)."""
    chosen = chosen.unsqueeze(1).int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()


def _grouped(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]


@cache
def _compiled_alone() -> Callable[..., Tensor]:
    """FlexAttention for blocks that are not compiled: without compilation it would hold all T x T scores."""
    fused: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return fused
