"""Which optimizer does `optim.name` ask for?"""

from collections.abc import Iterable
from typing import Any

import torch

from llmtrain.config import OptimConfig
from llmtrain.engines.adamw8bit import AdamW8bit
from llmtrain.engines.base import Optimizer, build_adamw, parameter_groups
from llmtrain.engines.muon import SCALE, MuonAndAdamW
from llmtrain.model.initial import is_block_matrix


def build_optimizer(
    named: Iterable[tuple[str, Any]], optim: OptimConfig, muon: type[torch.optim.Muon] = torch.optim.Muon
) -> Optimizer:
    """An optimizer of named parameters at learning rate 0; the rate is written before every update.

    `muon` is what trains the blocks' matrices where Muon is asked for.
    """
    if optim.name == "adamw":
        return build_adamw(named, optim)
    if optim.name == "adamw8bit":
        return AdamW8bit(parameter_groups(named, optim), optim)
    matrices, others = [], []
    for name, parameter in named:
        if is_block_matrix(name):
            matrices.append(parameter)
        else:
            others.append((name, parameter))
    group = {"params": matrices, "decay": optim.weight_decay, "lr_scale": 1.0}
    return MuonAndAdamW(muon([group], lr=0.0, adjust_lr_fn=SCALE), build_adamw(others, optim))
