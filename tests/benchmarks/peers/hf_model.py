"""Hugging Face's Llama in the shape all peers train."""

from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.peers.work import FFN, HEADS, LAYERS, SEQ, VOCAB, WIDTH


def llama() -> LlamaForCausalLM:
    """The model in fp32, on the CPU."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            intermediate_size=FFN,
            vocab_size=VOCAB,
            max_position_embeddings=SEQ,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
