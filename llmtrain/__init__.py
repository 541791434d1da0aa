"""llmtrain: pretrain LLaMA-style language models, with the learning-rate schedule as an exactly resumable experiment."""

__version__ = "0.1.0"
