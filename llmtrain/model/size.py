"""How large is a model, and how much work is a token? Counted from its shape, without building it.

Shapes: L layers, H heads, Q head size, T positions.
"""

import math

from llmtrain.config import ModelConfig
from llmtrain.model.initial import parameter_shapes


def parameter_count(config: ModelConfig) -> int:
    """All parameters, a tied head counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters a token is multiplied with: all matrices and the head, not the embedding that is only looked up."""
    matrices = sum(math.prod(shape) for shape in parameter_shapes(config).values() if len(shape) == 2)
    return matrices if config.tie_embeddings else matrices - config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of forward and backward for one token: 6 N + 12 L H Q T (Chowdhery 2022, arXiv:2204.02311, appendix B).

    N are the matmul parameters. The causal half of attention is not taken off, recomputation is not added.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_size * seq_len
    return 6 * matmul_parameters(config) + attention


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """FLOPs of the forward pass of all blocks for one token: what recomputing every block adds."""
    head = config.vocab_size * config.hidden_size
    attention = 4 * config.num_layers * config.num_heads * config.head_size * seq_len
    return 2 * (matmul_parameters(config) - head) + attention
