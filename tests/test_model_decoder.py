"""The decoder against a public implementation, and what engines may do to it."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from llmtrain.config import ModelConfig, RopeScaling
from llmtrain.model import precision
from llmtrain.model.decoder import Decoder
from llmtrain.model.initial import initial_slice, parameter_shapes
from llmtrain.model.loss import IGNORE
from llmtrain.model.rope import Rotary
from llmtrain.model.size import parameter_count


def small(**changes):
    shape = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 100}
    return ModelConfig(**{**shape, "vocab_size": 301, "max_seq_len": 64, **changes})


def built(config, seed=1):
    """A decoder with the initial values of `seed`, built the way the engines do it."""
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = initial_slice(config, name, 0, parameter.numel(), seed)
            parameter.copy_(torch.from_numpy(values).view(parameter.shape))
    return model


def batch(config, B=2, T=33):
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(config.vocab_size, (2, B, T), generator=generator)
    targets[0, :5] = IGNORE
    return tokens, targets


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


HF_NAMES = {
    "embed.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "attention_norm.": "input_layernorm.",
    "attention.wq.": "self_attn.q_proj.",
    "attention.wk.": "self_attn.k_proj.",
    "attention.wv.": "self_attn.v_proj.",
    "attention.wo.": "self_attn.o_proj.",
    "ffn_norm.": "post_attention_layernorm.",
    "ffn.w_gate.": "mlp.gate_proj.",
    "ffn.w_up.": "mlp.up_proj.",
    "ffn.w_down.": "mlp.down_proj.",
    "head.": "lm_head.",
}


def transformers_model(config, weights):
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": scaling.original_max_seq_len}
        rope |= {name: getattr(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.ffn_size,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            rope_parameters=rope,
            attn_implementation="sdpa",
        )
    )
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in HF_NAMES.items():
            name = name.replace(ours, theirs)
        renamed["model.norm.weight" if name == "norm.weight" else name] = tensor
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"tie_embeddings": True},
        {"rope_theta": 500_000.0, "rope_scaling": RopeScaling(original_max_seq_len=16)},
        {"hidden_size": 42, "num_heads": 7, "num_kv_heads": 1, "ffn_size": 53, "vocab_size": 97, "num_layers": 1},
    ],
    ids=["gqa", "mha", "mqa", "tied", "rope_scaling", "odd_sizes"],
)
def test_logits_equal_transformers(changes):
    """Weights trained here would speak gibberish elsewhere, or published ones here."""
    config = small(init_std=0.1, **changes)
    model = built(config)
    tokens, _ = batch(config, T=61)
    with torch.no_grad():
        theirs = transformers_model(config, model.state_dict())(input_ids=tokens).logits
        ours = model(tokens)
    assert ours.dtype == torch.float32
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
    ],
)
def test_a_published_model_is_built_on_meta_with_its_published_size(preset, count):
    """A preset would not be the model it is named after, or building it would take memory."""
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count == parameter_count(config)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_the_canonical_ones(tied):
    """Checkpoints and initial values would miss a parameter."""
    config = small(tie_embeddings=tied)
    shapes = {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}
    assert list(shapes.items()) == list(parameter_shapes(config).items())


def test_a_new_model_predicts_the_uniform_distribution():
    """The first loss of a run would be far above log(vocabulary)."""
    config = small()
    tokens, targets = batch(config)
    loss = built(config)(tokens, targets) / (targets != IGNORE).sum()
    assert abs(loss.item() - math.log(config.vocab_size)) < 0.1


@pytest.mark.parametrize("scaling", [None, RopeScaling(original_max_seq_len=2048)])
def test_rope_tables_stay_exact_in_a_bf16_model(scaling):
    """Positions beyond 256 would collapse: bf16 cannot count further."""
    config = small(max_seq_len=4096, rope_scaling=scaling, num_layers=1)
    model = built(config).to(torch.bfloat16)
    tokens, targets = batch(config)
    model(tokens, targets).backward()
    Q, last = config.head_size, config.max_seq_len - 1
    for i in range(Q // 2):
        frequency = config.rope_theta ** (-2 * i / Q)
        if scaling is not None:
            turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = min(max((turns - low) / (high - low), 0), 1)
            frequency *= kept + (1 - kept) / scaling.factor
        for half, sign in ((i, -1), (i + Q // 2, 1)):
            assert abs(model.rotary.cos[last, 0, half].item() - math.cos(last * frequency)) < 1e-6
            assert abs(model.rotary.sin[last, 0, half].item() - sign * math.sin(last * frequency)) < 1e-6


def test_rotation_gradient_equals_that_of_plain_operations():
    """Queries and keys would be trained on a wrong gradient."""
    config = small()
    rotary = Rotary(config)
    rotary.prepare(torch.device("cpu"))
    x = torch.randn(2, 9, 4, config.head_size, dtype=torch.float64, requires_grad=True)
    fast = rotary(x)
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary.cos[:9].chunk(2, dim=-1)[1], rotary.sin[:9].chunk(2, dim=-1)[1]
    plain = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    weights = torch.randn_like(x)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    (theirs,) = torch.autograd.grad((plain * weights).sum(), x)
    (ours,) = torch.autograd.grad((fast * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_document_is_blind_to_the_others(dtype, kv_heads):
    """With the document mask on, a document's logits would still depend on its neighbours in the sequence."""
    config = small(num_kv_heads=kv_heads)
    model = built(config).to(dtype)
    tokens, _ = batch(config)
    documents = (torch.arange(33) >= 14).long().expand(2, 33)
    changed = tokens.clone()
    changed[:, :14] = (changed[:, :14] + 7) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens, document_ids=documents), model(changed, document_ids=documents)
        unmasked = model(changed)
    assert torch.equal(before[:, 14:], after[:, 14:])
    assert not torch.equal(before[:, :14], after[:, :14])
    assert not torch.equal(after[:, 14:], unmasked[:, 14:])


def test_one_document_is_plain_causal_attention():
    """Switching the mask on would change runs whose sequences hold a single document."""
    config = small()
    model = built(config)
    tokens, _ = batch(config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, document_ids=torch.zeros_like(tokens)), model(tokens))


@pytest.mark.parametrize("step", ["to_empty", "bf16", "double", "meta"])
def test_tied_weights_stay_one(step):
    """Embedding and head would part silently and train as two."""
    with torch.device("meta" if step == "to_empty" else "cpu"):
        model = Decoder(small(tie_embeddings=True))
    moves = {
        "to_empty": lambda: model.to_empty(device="cpu"),
        "bf16": lambda: model.to(torch.bfloat16),
        "double": lambda: model.double(),
        "meta": lambda: model.to("meta"),
    }
    moves[step]()
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_tied_weights_get_the_gradient_of_both_uses():
    """The embedding of a tied model would be trained by only one of its two ends."""
    config = small(tie_embeddings=True)
    model = built(config)
    tokens, targets = batch(config)
    model(tokens, targets).backward()
    ours = gradients(model)
    model.zero_grad()
    logits = model(tokens).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_recomputing_blocks_changes_nothing(dtype, masked):
    """Saving memory would change the run."""
    config = small()
    model = built(config).to(dtype)
    tokens, targets = batch(config)
    documents = (torch.arange(33) // 11).expand(2, 33) if masked else None
    results = []
    for recompute in ([False] * 3, [True] * 3, [False, True, False]):
        for block, on in zip(model.blocks, recompute, strict=True):
            block.recompute = "all" if on else "none"
        model.zero_grad()
        loss = model(tokens, targets, documents)
        loss.backward()
        results.append((loss, gradients(model)))
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(grads[name], gradient) for name, gradient in results[0][1].items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # what dynamo does itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_eager_loss(recompute):
    """`compile: true` would train another model, or would not run at all."""
    config = small(num_layers=1)
    model = built(config)
    tokens, targets = batch(config)
    eager = model(tokens, targets)
    eager.backward()
    expected = gradients(model)
    model.zero_grad()
    model.blocks[0].recompute = "all" if recompute else "none"
    torch.compiler.reset()
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    compiled = model(tokens, targets)
    compiled.backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_bf16_loss_is_close_to_fp32():
    """bf16 training would lose more than bf16's rounding."""
    config = small()
    model = built(config)
    tokens, targets = batch(config)
    with torch.no_grad():
        exact = model(tokens, targets)
        rounded = model.to(torch.bfloat16)(tokens, targets)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=0)


class Products(TorchDispatchMode):
    """The types in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func._schema.name for word in ("::mm", "::bmm", "::addmm", "attention")):
            self.dtypes.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_autocast_computes_in_fp32_what_this_cpu_multiplies_slowly(monkeypatch):
    """ZeRO-0 in bf16 would take five times as long as the other stages on a laptop."""
    config = small()
    found = {}
    for native in (True, False):
        monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", native)
        model = built(config)
        with Products() as products:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(*batch(config))
                logits = model(batch(config)[0])
            loss.backward()
        found[native] = loss.detach(), gradients(model), logits.detach()
        assert products.dtypes == ({torch.float32, torch.bfloat16} if native else {torch.float32})
    torch.testing.assert_close(found[False][0], found[True][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[False][2], found[True][2], rtol=2**-6, atol=2**-6)
    for name, gradient in found[False][1].items():
        assert (gradient - found[True][1][name]).norm() < 0.02 * gradient.norm(), name
