"""How does Muon update the blocks' matrices, whole or sharded?

The momentum of a matrix, a running mean of its gradients with Nesterov's step, is brought to singular values near 1 by
five Newton-Schulz steps in bf16 (Jordan 2024, https://kellerjordan.github.io/posts/muon). Times 0.2 sqrt(longer side)
an update is about as large as one of AdamW, so one peak and one weight decay fit both (Liu 2025, arXiv:2502.16982).
Embedding, head and norms stay with AdamW.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import _muon

from llmtrain.engines.base import MOMENTUM

SCALE = "match_rms_adamw"


class MuonAndAdamW:
    """Two optimizers driven as one: the groups and the state of both, those of the matrices first."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        self.param_groups: list[dict[str, Any]] = [*muon.param_groups, *adamw.param_groups]
        self.state: Any = muon.state
        adamw.state = muon.state

    def step(self) -> None:
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


class ShardedMuon(torch.optim.Muon):
    """Muon for matrices sharded by rows: each is put together on one rank, which hands the new rows back.

    Ranks take turns, and matrices of one shape come side by side, so that their work is equal. Only what Newton-Schulz
    is given and gives travels, in the bf16 it computes in: the update is that of the whole matrix.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        matrices = sorted(group["params"], key=lambda matrix: tuple(matrix.shape))
        mesh = matrices[0].device_mesh
        sharing = mesh.get_group(mesh.ndim - 1)
        together = dist.get_world_size(sharing)
        for first in range(0, len(matrices), together):
            self._update(matrices[first : first + together], group, sharing)

    def _update(self, matrices: Sequence[DTensor], group: dict[str, Any], sharing: dist.ProcessGroup) -> None:
        """Update at most as many matrices as there are ranks; that of place r is orthogonalised on rank r."""
        rank, ranks = dist.get_rank(sharing), dist.get_world_size(sharing)
        directions = [self._direction(matrix, group["momentum"]) for matrix in matrices]
        sent = [direction.numel() for direction in directions] + [0] * (ranks - len(matrices))
        received = _shard_sizes(matrices[rank].shape, ranks) if rank < len(matrices) else [0] * ranks
        parts = torch.cat(directions)
        whole = parts.new_empty(sum(received))
        dist.all_to_all_single(whole, parts, received, sent, group=sharing)
        if rank < len(matrices):
            settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
            whole = _muon._zeropower_via_newtonschulz(whole.view(matrices[rank].shape), *settings).reshape(-1)
        dist.all_to_all_single(parts, whole, sent, received, group=sharing)
        for matrix, part in zip(matrices, torch.split(parts, sent[: len(matrices)]), strict=True):
            local = matrix.to_local()
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(part.view_as(local), alpha=-_muon._adjust_lr(group["lr"], SCALE, matrix.shape))

    def _direction(self, matrix: DTensor, momentum: float) -> Tensor:
        """This rank's rows of what is orthogonalised, once the gradient is in the running mean. 1-D bf16"""
        assert isinstance(matrix.grad, DTensor)
        gradient, mean = matrix.grad.to_local(), self.state[matrix][MOMENTUM].to_local()
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum).bfloat16().view(-1)


def _shard_sizes(shape: Sequence[int], ranks: int) -> list[int]:
    """Elements of a matrix on each rank."""
    chunk = -(-shape[0] // ranks)
    return [max(0, min(chunk, shape[0] - rank * chunk)) * shape[1] for rank in range(ranks)]
