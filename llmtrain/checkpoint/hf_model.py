"""What is a LLaMA to the Hugging Face world? The names of its weights, and its `config.json`, to and from ours.

Both sides keep weights as (out, in) and rotate halves, so no weight is permuted or transposed: only names differ. The
positions of RoPE are written as `rope_theta` and `rope_scaling`, which every version of `transformers` reads, and read
from `rope_parameters` too, where version 5 keeps them.
"""

from typing import Any

from llmtrain.config import ModelConfig
from llmtrain.config_file import read_section
from llmtrain.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INNER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.w_gate": "mlp.gate_proj",
    "ffn.w_up": "mlp.up_proj",
    "ffn.w_down": "mlp.down_proj",
}
_SIZES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
_ONLY = {  # what the decoder is; a model that is anything else is refused
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def hf_name(name: str) -> str:
    """Their name of a parameter of ours."""
    module = name.removesuffix(".weight")
    if module in _OUTER:
        return f"{_OUTER[module]}.weight"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{_INNER[part]}.weight"


def to_hf_config(model: ModelConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """The content of config.json; `dtype` as torch names it. EOS is the BOS token too: see hf_tokenizer."""
    scaling = model.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_seq_len,
        "rope_theta": model.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }


def from_hf_config(values: dict[str, Any], where: str) -> ModelConfig:
    """Our model of a config.json. Raises CheckpointError naming the field that the decoder cannot express."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    found = {"model_type": values.get("model_type"), **{field: values.get(field, _ONLY[field]) for field in _ONLY}}
    found["partial_rotary_factor"] = rope.get("partial_rotary_factor", found["partial_rotary_factor"])
    for field, wanted in {"model_type": "llama", **_ONLY}.items():
        if found[field] != wanted:
            raise CheckpointError(f"{where}: {field} is {found[field]!r}, llmtrain's decoder has only {wanted!r}")
    missing = [theirs for theirs in _SIZES.values() if theirs not in values]
    if missing:
        raise CheckpointError(f"{where} has no {', '.join(missing)}: it is not the config of a LLaMA model")
    section: dict[str, Any] = {
        **{ours: values[theirs] for ours, theirs in _SIZES.items()},
        "num_kv_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "max_seq_len": values.get("max_position_embeddings", 2048),
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        "rope_scaling": _rope_scaling(rope, where),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "init_std": values.get("initializer_range", 0.02),
    }
    model = read_section(ModelConfig, section, where)
    if values.get("head_dim") not in (None, model.head_size):
        raise CheckpointError(
            f"{where}: head_dim is {values['head_dim']!r}, llmtrain's decoder has only hidden_size / "
            f"num_attention_heads = {model.head_size}"
        )
    return model


def _rope_scaling(rope: dict[str, Any], where: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f'{where}: rope_type is {kind!r}, llmtrain\'s decoder has only "default" and "llama3"')
    names = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")}
    names["original_max_seq_len"] = "original_max_position_embeddings"
    missing = [theirs for theirs in names.values() if theirs not in rope]
    if missing:
        raise CheckpointError(f"{where}: the RoPE scaling has no {', '.join(missing)}")
    return {ours: rope[theirs] for ours, theirs in names.items()}
