"""Weights and tokenizers that leave for the Hugging Face world, and those that come from it."""

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from llmtrain.checkpoint.files import PIECE
from llmtrain.checkpoint.hf_export import export_checkpoint
from llmtrain.checkpoint.hf_import import import_folder
from llmtrain.checkpoint.hf_tokenizer import require_expressible, write_tokenizer
from llmtrain.checkpoint.imported import ImportedWeights, open_import
from llmtrain.checkpoint.store import CheckpointStore, open_checkpoint
from llmtrain.cli_hf import export, import_
from llmtrain.config import ModelConfig, RopeScaling
from llmtrain.config_file import load_config
from llmtrain.data.dataset import open_data
from llmtrain.data.prepare import prepare
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.distributed import World
from llmtrain.engines.base import WEIGHT, FlatState, Slice
from llmtrain.errors import CheckpointError, ConfigError, DataError, LlmtrainError
from llmtrain.model.decoder import Decoder
from llmtrain.model.initial import initial_slice, parameter_shapes
from llmtrain.train.feed import validation_sets
from llmtrain.train.metrics import read_metrics
from llmtrain.train.run import train
from llmtrain.train.saved import evaluate_run, generate
from llmtrain.trajectory import trajectory_of
from tests.ranks import Ranks

Leg = Callable[..., Ranks]

ALONE = World(0, 1, 0, torch.device("cpu"))
HARD = [
    "",
    " ",
    "  lead",
    "trail  ",
    "a\n\n\tb\r\n",
    "\n",
    "\t\t\t",
    " " * 37,
    "x" * 300,
    "é你🙂\ufeff",
    "e\u0301\u200d👩\u200d👩\u200d👧",
    "</s><s><unk>",
    "</s> text </s>",
    "a\0b",
    "123 4567",
    "<0x41>",
    "\ufffd\uffff\U0010ffff\x7f\x80",
]


def small(**changes: Any) -> ModelConfig:
    shape = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 100}
    return ModelConfig(**{**shape, "vocab_size": 301, "max_seq_len": 64, "init_std": 0.1, **changes})


def values(model: ModelConfig) -> dict[str, torch.Tensor]:
    """A weight for every parameter; norms that are not 1, so that a mix-up shows."""
    tensors = {}
    for name, shape in parameter_shapes(model).items():
        tensor = torch.from_numpy(initial_slice(model, name, 0, math.prod(shape), 1)).view(shape)
        tensors[name] = tensor + 0.1 * torch.arange(shape[0]) / shape[0] if name.endswith("norm.weight") else tensor
    return tensors


def checkpoint(folder: Path, model: ModelConfig, tokenizer_hash: str = "") -> Path:
    """A checkpoint of these values, in two slices a parameter."""
    slices = []
    for name, tensor in values(model).items():
        flat = tensor.flatten()
        for start, stop in ((0, flat.numel() // 3), (flat.numel() // 3, flat.numel())):
            slices.append(Slice(name, start, stop, flat.numel(), {WEIGHT: flat[start:stop]}))
    state = {
        "step": 5,
        "trajectory": {"model": model.model_dump(mode="json", exclude={"preset"})},
        "compare": {"tokenizer_hash": tokenizer_hash},
    }
    store = CheckpointStore(folder, ALONE, keep=2)
    assert store.save(FlatState(slices, 5), state) is None
    return folder / "step_00000005"


def exported(folder: Path, model: ModelConfig, dtype: Any = "fp32", shard_bytes: int = 2_000_000_000) -> Path:
    out = folder / f"hf_{dtype}"
    found = open_checkpoint(checkpoint(folder / "run", model))
    export_checkpoint(found, out, tokenizer=None, dtype=dtype, shard_bytes=shard_bytes)
    return out


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def opened(folder: Path) -> LlamaForCausalLM:
    model, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    return model.eval()


def their_perplexity(model: LlamaForCausalLM, run: Path) -> float:
    """What `transformers` makes of the run's validation set."""
    config = load_config(run / "config.yaml")
    (held_out,) = validation_sets(config, open_data(config.data.path))
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for batch in held_out.batches(0, 1, 2):
            logits = model(input_ids=batch.tokens).logits.double().flatten(0, 1)
            nats += torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="sum").item()
            tokens += batch.num_valid
    assert tokens == held_out.num_tokens
    return math.exp(nats / tokens)


@pytest.mark.parametrize(
    "engine", [("engine.kind=deepspeed", "engine.zero_stage=3"), ("engine.kind=fsdp",)], ids=["zero3", "fsdp"]
)
def test_a_sharded_run_leaves_and_comes_back(
    leg: Leg, tmp_path: Path, prepared: dict[str, Any], engine: tuple[str, ...]
) -> None:
    """A trained model would be worse elsewhere than it was here, or a run would not go on from what was published."""
    run, out, back = tmp_path / "run", tmp_path / "hf", tmp_path / "back"
    leg("run", 2, *engine, "model.max_seq_len=128").succeeded()
    export(run, out, shard_gb=0.001)
    (ours,) = evaluate_run(run)
    theirs = opened(out)
    assert theirs.generation_config.suppress_tokens == list(range(350, 400))  # ids that the tokenizer does not have
    assert their_perplexity(theirs, run) == pytest.approx(ours["perplexity"], rel=1e-6)

    tokenizer = AutoTokenizer.from_pretrained(out)
    for prompt in ("def ", "    return", ""):
        *_, text = generate(run, prompt, max_tokens=64, temperature=0, seed=0)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == text

    import_(out, back)
    data = {**prepared["data"], "path": str(tmp_path / "data")}
    data["tokenizer"] = {"kind": "model", "path": str(back / "tokenizer.model")}
    config = {**prepared, **yaml.safe_load((back / "model.yaml").read_text()), "data": data}
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config))
    loaded = load_config(path, [f"run.dir={tmp_path / 'again'}", f"run.init_from={back}", "run.stop_at=1 steps"])
    prepare(loaded.data, workers=1, model_vocab_size=loaded.model.vocab_size, force=False, command="")
    train(loaded, prepare_command="")
    first = next(row for row in read_metrics(tmp_path / "again") if row["kind"] == "validation")
    assert (first["step"], first["perplexity"]) == (0, ours["perplexity"])
    assert first["set_hash"] == ours["set_hash"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "tie_embeddings": True},
        {"rope_theta": 500_000.0, "rope_scaling": RopeScaling(original_max_seq_len=16), "norm_eps": 1e-3},
        {"hidden_size": 42, "num_heads": 7, "num_kv_heads": 1, "ffn_size": 53, "vocab_size": 97, "num_layers": 1},
    ],
    ids=["gqa", "mha", "mqa_tied", "rope_scaling", "odd_sizes"],
)
def test_logits_and_weights_survive_the_way_out_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A name, a shape or a number of the config would be lost on the way, and with it the model."""
    model = small(**changes)
    out = exported(tmp_path, model, shard_bytes=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
    decoder = Decoder(model)
    decoder.load_state_dict(values(model), strict=not model.tie_embeddings)
    tokens = torch.randint(model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    llama = opened(out)
    with torch.no_grad():
        ours, theirs = decoder(tokens), llama(input_ids=tokens).logits
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    ids = tokens[:1, :1]
    made = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=63, do_sample=False, use_cache=False)
    with torch.no_grad():
        while ids.shape[1] < 64:
            ids = torch.cat((ids, decoder(ids)[:, -1:].argmax(-1)), dim=1)
    assert ids.unique().numel() > 2 or model.tie_embeddings  # a tied model of chance repeats itself
    assert torch.equal(made, ids)

    assert import_folder(out, tmp_path / "back") == model
    weights = open_import(str(tmp_path / "back"), model, ALONE)
    for name, tensor in values(model).items():
        assert torch.equal(weights.read(name, WEIGHT, 0, tensor.numel()), tensor.flatten())
    assert not weights.read("norm.weight", "exp_avg", 3, 9).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "50KB"])
def test_what_transformers_wrote_is_read_exactly(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    """Published weights would be other weights here."""
    scaling = RopeScaling(original_max_seq_len=16)
    model = small(tie_embeddings=shard == "1GB", rope_theta=20_000.0, rope_scaling=scaling)
    theirs = opened(exported(tmp_path, model)).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert import_folder(tmp_path / "theirs", tmp_path / "back") == model
    weights = open_import(str(tmp_path / "back"), model, ALONE)
    for name, tensor in values(model).items():
        assert torch.equal(weights.read(name, WEIGHT, 0, tensor.numel()), tensor.flatten().to(dtype).float())


def test_bf16_is_the_rounded_fp32(tmp_path: Path) -> None:
    """Exported weights would be truncated, and a little worse than they need be."""
    whole, half = everything(exported(tmp_path, small())), everything(exported(tmp_path, small(), "bf16"))
    assert whole.keys() == half.keys()
    for name, tensor in whole.items():
        assert half[name].dtype == torch.bfloat16
        assert torch.equal(half[name], tensor.bfloat16())


def holes(folder: Path, model: ModelConfig) -> Path:
    """A checkpoint of zeros that takes no room on the disk."""
    path = checkpoint(folder, small())
    header, end = {}, 0
    for name, shape in parameter_shapes(model).items():
        numel = math.prod(shape)
        entry = {"dtype": "F32", "shape": [numel], "data_offsets": [end, end + 4 * numel]}
        header[f"{WEIGHT}/{name}/0"] = entry
        end += 4 * numel
    text = json.dumps(header).encode()
    with (path / "rank_00000.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    state = json.loads((path / "state.json").read_text())
    state["trajectory"]["model"] = model.model_dump(mode="json", exclude={"preset"})
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["file"] != "index.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


MEASURE = """
import sys
from pathlib import Path
from llmtrain.checkpoint.hf_export import export_checkpoint
from llmtrain.checkpoint.hf_import import import_folder
from llmtrain.checkpoint.store import open_checkpoint

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
for path in sys.argv[1:]:
    out = Path(path).with_name("hf")
    export_checkpoint(open_checkpoint(path), out, tokenizer=None, dtype="bf16", shard_bytes=30_000_000)
    import_folder(out, out.with_name("back"))
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model larger than the login node's memory could be trained, and then be taken nowhere."""
    paths = []
    for layers in (2, 12):
        model = small(hidden_size=512, num_layers=layers, num_heads=8, num_kv_heads=8, ffn_size=2048, vocab_size=16_000)
        paths.append(holes(tmp_path / str(layers), model))
    assert (paths[1] / "rank_00000.safetensors").stat().st_size > 260_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small_peak, large_peak = map(int, done.stdout.split())
    assert large_peak < 12 * 4 * PIECE
    assert large_peak < small_peak + 3 * 4 * PIECE


def check_ids(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.eos_id
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.encode(text) == [tokenizer.eos_id, *ids]
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == tokenizer.decode(ids) == text


def drawn_texts(tokenizer: Tokenizer) -> list[str]:
    """Runs of one character, and pieces in an order no writer would think of."""
    draw = random.Random(1)
    pieces = [tokenizer.decode([token]) for token in range(259, tokenizer.vocab_size)] + HARD
    runs = ["".join(c * draw.randint(1, 30) for c in draw.choices(" -=#\"'ae\n0", k=4)) for _ in range(400)]
    return [*runs, *("".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(400))]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def test_the_exported_tokenizer_gives_the_same_ids(prepared: dict[str, Any], tokenizer_folder: Path) -> None:
    """The exported model would read other text than it was given, and nobody would notice but by its answers."""
    tokenizer = Tokenizer.load(Path(prepared["data"]["path"]) / "tokenizer.model")
    write_tokenizer(tokenizer, 10_000, tokenizer_folder)
    check_ids(tokenizer_folder, tokenizer, [*HARD, *drawn_texts(tokenizer), Path(__file__).read_text()])


def given(tmp_path: Path, **options: Any) -> Tokenizer:
    """A tokenizer that others trained, with rules of their own."""
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "minloglevel": 2, **options}
    prefix = str(tmp_path / "given")
    lines = [line for line in Path(__file__).read_text().split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=prefix, **settings)
    return Tokenizer.load(f"{prefix}.model")


def test_a_tokenizer_with_a_prefix_space_gives_the_same_ids(tokenizer_folder: Path) -> None:
    """A run on a published LLaMA tokenizer could not be exported, or its first word would be another one."""
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    tokenizer = given(tokenizer_folder, **plain)
    require_expressible(tokenizer, "given")
    write_tokenizer(tokenizer, 10_000, tokenizer_folder)
    check_ids(tokenizer_folder, tokenizer, [*HARD, *drawn_texts(tokenizer)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalization_rule_name": "identity"}, "it removes spaces"),
        ({"remove_extra_whitespaces": False}, "it normalises text"),
        ({"model_type": "unigram"}, "it is not a BPE model"),
        ({"user_defined_symbols": ["<|end|>"]}, "it has symbols of the user"),
    ],
)
def test_a_tokenizer_that_cannot_be_said_exactly_is_refused(tmp_path: Path, options: Any, said: str) -> None:
    """It would be exported as something close to it."""
    with pytest.raises(DataError, match=f"tokenizer given cannot .*{said}.*--no-tokenizer"):
        require_expressible(given(tmp_path, **options), "given")


def test_another_tokenizer_than_the_runs_is_refused(tmp_path: Path, prepared: dict[str, Any]) -> None:
    """Data that was prepared anew since would give the weights a tokenizer they have never seen."""
    found = open_checkpoint(checkpoint(tmp_path / "run", small(vocab_size=400), "another"))
    with pytest.raises(DataError, match="the checkpoint was trained with another"):
        path = Path(prepared["data"]["path"]) / "tokenizer.model"
        export_checkpoint(found, tmp_path / "out", tokenizer=path, dtype="fp32", shard_bytes=10**9)
    with pytest.raises(DataError, match=r"cannot read tokenizer .*No such file.*--no-tokenizer"):
        export_checkpoint(found, tmp_path / "out", tokenizer=tmp_path / "gone", dtype="fp32", shard_bytes=10**9)
    assert not (tmp_path / "out").exists()


def test_export_overwrites_nothing_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published folder would be lost, or a half-written one would be published."""
    found = open_checkpoint(checkpoint(tmp_path / "run", small()))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for folder in (full, full / "mine.txt"):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            export_checkpoint(found, folder, tokenizer=None, dtype="fp32", shard_bytes=10**9)
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=r"cannot be written: .*No space left"):

        def refusing(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("llmtrain.checkpoint.hf_export._write_configs", refusing)
        export_checkpoint(found, tmp_path / "out", tokenizer=None, dtype="fp32", shard_bytes=10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_checkpoint(found, tmp_path / "empty", tokenizer=None, dtype="fp32", shard_bytes=10**9)
    assert opened(tmp_path / "empty").num_parameters() > 0


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """Some weights would be exported, and the rest would be left to chance."""
    path = checkpoint(tmp_path, small())
    state = json.loads((path / "state.json").read_text())
    for layers, what in ((4, "does not hold blocks.3."), (2, "holds, unlike its model, blocks.2.")):
        state["trajectory"]["model"]["num_layers"] = layers
        (path / "state.json").write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match=what):
            export_checkpoint(open_checkpoint(path), tmp_path / "o", tokenizer=None, dtype="fp32", shard_bytes=10**9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is None"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"num_hidden_layers": "three"}, "num_layers"),
        ({"intermediate_size": 101}, r"shape \(100, 64\), the config wants \(101, 64\)"),
        ({"num_hidden_layers": 4}, r"model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, r"model.layers.2.* has no place in llmtrain's decoder \(9 such"),
    ],
)
def test_a_model_the_decoder_is_not_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """Weights would be imported into a model that computes something else with them."""
    out = exported(tmp_path, small())
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(LlmtrainError, match=said):
        import_folder(out, tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_a_damaged_folder_is_refused_by_file(tmp_path: Path) -> None:
    """A download that was cut short would end in a traceback, or in a model of garbage."""
    out = exported(tmp_path, small(), shard_bytes=40_000)
    first, *_, last = sorted(out.glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in out.iterdir()}

    def refused(said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            import_folder(out, tmp_path / "back")
        assert not list(tmp_path.glob("back*"))
        for path, content in whole.items():
            path.write_bytes(content)

    last.write_bytes(whole[last][:-7])
    refused(f"{last.name} is not a readable safetensors file")
    first.unlink()
    refused(f"{first.name} is not a readable safetensors file")
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(first).items()}, first)
    refused(r"model.embed_tokens.weight is I8, only F32, BF16, F16 are read")
    save_file({}, first)
    refused(f"model.embed_tokens.weight is missing from .*{first.name}")
    (out / "model.safetensors.index.json").write_text("{}")
    refused("index.json has no weight_map")
    (out / "model.safetensors.index.json").unlink()
    refused("has neither model.safetensors nor model.safetensors.index.json: only safetensors are read")
    (out / "config.json").write_text("{")
    refused("config.json is not JSON")
    (out / "config.json").unlink()
    refused("cannot read .*config.json: No such file or directory; it is no Hugging Face model folder")
    import_folder(out, tmp_path / "back")
    with pytest.raises(CheckpointError, match="back exists and is not empty"):
        import_folder(out, tmp_path / "back")


def test_weights_stored_beside_those_of_the_model_are_known(tmp_path: Path) -> None:
    """Old LLaMA folders with RoPE's frequencies in them, and tied ones with a head, could not be imported."""
    model = small(tie_embeddings=True)
    out = exported(tmp_path, model)
    tensors = everything(out)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    assert import_folder(out, tmp_path / "back") == model
    with safe_open(tmp_path / "back" / "weights.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == len(parameter_shapes(model))


@pytest.fixture
def imported(tmp_path: Path, prepared: dict[str, Any]) -> Callable[..., Any]:
    """A config that starts from imported weights in `tmp_path/back`, with overrides."""
    model = ModelConfig(**prepared["model"])
    import_folder(exported(tmp_path, model), tmp_path / "back")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(prepared))
    words = [f"run.dir={tmp_path / 'started'}", f"run.init_from={tmp_path / 'back'}", "run.stop_at=1 steps"]
    return lambda *overrides: load_config(path, [*words, *overrides])


def test_imported_weights_are_part_of_what_a_run_is(imported: Any, tmp_path: Path) -> None:
    """A run could be resumed as if it had begun elsewhere; or old runs could no longer be resumed at all."""
    train(imported(), prepare_command="")
    train(imported("run.stop_at=2 steps"), prepare_command="")
    assert [row["step"] for row in read_metrics(tmp_path / "started") if row["kind"] == "step"] == [1, 2]
    with pytest.raises(CheckpointError, match=r"init_from: there '[0-9a-f]{16}', in this config None"):
        train(imported("run.init_from=null", "run.stop_at=3 steps"), prepare_command="")
    assert "init_from" not in trajectory_of(imported("run.init_from=null"), "data")


def test_the_hash_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    """The same weights from another download would be another run; other weights would be the same."""
    hashes = []
    for name, (shard_bytes, changes) in enumerate(((10**9, {}), (40_000, {}), (10**9, {"init_std": 0.11}))):
        out = exported(tmp_path / str(name), small(**changes), shard_bytes=shard_bytes)
        import_folder(out, tmp_path / f"back_{name}")
        hashes.append(json.loads((tmp_path / f"back_{name}" / "import.json").read_text())["weights_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_start_from_what_does_not_fit_is_refused(imported: Any, tmp_path: Path) -> None:
    """A run of days would begin from the wrong weights, or from damaged ones."""
    started = tmp_path / "started"
    with pytest.raises(CheckpointError, match=r"(?s)another model:.*model.norm_eps: there 1e-05, in this config 0.001"):
        train(imported("model.norm_eps=0.001"), prepare_command="")
    weights = tmp_path / "back" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-50] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights.safetensors: head.weight is not what was imported"):
        train(imported(), prepare_command="")
    weights.write_bytes(content[:-50])
    with pytest.raises(CheckpointError, match=r"weights.safetensors"):
        train(imported(), prepare_command="")
    for damage, said in (
        (lambda path: path.write_text("{}"), "is damaged"),
        (Path.unlink, "cannot read .*import.json"),
    ):
        damage(tmp_path / "back" / "import.json")
        with pytest.raises(ConfigError, match=said):
            train(imported(), prepare_command="")
    assert not list(started.glob("checkpoints/step_*"))


def test_every_rank_hears_of_damage_that_one_found(imported: Any, tmp_path: Path) -> None:
    """One rank would stop and the others wait for it."""

    class TwoRanks(World):
        def gather_text(self, text: str) -> list[str]:
            return [text, "what the other rank found"]

    with pytest.raises(CheckpointError, match="what the other rank found"):
        open_import(str(tmp_path / "back"), imported().model, TwoRanks(0, 2, 0, torch.device("cpu")))


def test_pieces_of_any_range_are_read(imported: Any, tmp_path: Path) -> None:
    """A shard of a weight would hold another part of it."""
    model = imported().model
    weights = open_import(str(tmp_path / "back"), model, ALONE)
    assert isinstance(weights, ImportedWeights)
    flat = values(model)["blocks.1.ffn.w_up.weight"].flatten()
    for start, stop in itertools.pairwise((0, 1, 17, 4001, flat.numel())):
        assert torch.equal(weights.read("blocks.1.ffn.w_up.weight", WEIGHT, start, stop), flat[start:stop])
