"""llmtrain: pretrain LLaMA-style language models; the learning-rate schedule is an exactly resumable experiment."""

__version__ = "0.1.0"
