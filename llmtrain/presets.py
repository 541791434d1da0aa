"""The shapes of well-known LLaMA models, by name.

A preset is a starting point: any field written beside `preset:` in a config wins over it. Sources: Touvron 2023,
arXiv:2302.13971, table 2 (llama-7b, llama-13b); Grattafiori 2024, arXiv:2407.21783, table 3 (llama3-8b, llama3-70b).
`1b` and `3b` have the shapes of TinyLlama 1.1B and OpenLLaMA 3B; the smaller ones are our own, with the
feed-forward of about 8/3 of the family.
"""

from typing import Any


def _llama(
    hidden: int, layers: int, heads: int, ffn: int, kv_heads: int | None = None, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads or heads,
        "ffn_size": ffn,
        "vocab_size": 32000,
        "max_seq_len": 2048,
        **others,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _llama(128, 4, 4, 352, vocab_size=4096, max_seq_len=512),
    "60m": _llama(512, 8, 8, 1376),
    "125m": _llama(768, 12, 12, 2048),
    "350m": _llama(1024, 24, 16, 2736),
    "1b": _llama(2048, 22, 32, 5632, kv_heads=4),
    "3b": _llama(3200, 26, 32, 8640),
    "llama-7b": _llama(4096, 32, 32, 11008, norm_eps=1e-6),
    "llama-13b": _llama(5120, 40, 40, 13824, norm_eps=1e-6),
    "llama3-8b": _llama(4096, 32, 32, 14336, kv_heads=8, vocab_size=128256, max_seq_len=8192, rope_theta=500_000.0),
    "llama3-70b": _llama(8192, 80, 64, 28672, kv_heads=8, vocab_size=128256, max_seq_len=8192, rope_theta=500_000.0),
}
