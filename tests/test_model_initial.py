"""Initial weights as a pure function of seed, name and element."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import Config, ModelConfig
from llmtrain.model.initial import CHUNK, draw_initial, initial_slice, parameter_shapes
from llmtrain.train import start

CONFIG = ModelConfig(
    hidden_size=96, num_layers=2, num_heads=4, ffn_size=256, vocab_size=CHUNK // 40, max_seq_len=64, init_std=0.02
)
SIZE = CHUNK // 40 * 96  # of the embedding: two whole chunks and a part
GOLDEN_ELEMENTS = [
    "-0x1.94170a0000000p-6",
    "0x1.c3f29c0000000p-8",
    "-0x1.16eda40000000p-8",
    "0x1.5b81d40000000p-5",
]
GOLDEN_HASH = "52e119090317531f"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, SIZE), max_size=5))
def test_slices_together_are_the_whole(cuts):
    """A sharded start would differ from a whole one, so a run would depend on its number of ranks."""
    whole = initial_slice(CONFIG, "embed.weight", 0, SIZE, seed=7)
    edges = [0, *sorted(cuts), SIZE]
    parts = [initial_slice(CONFIG, "embed.weight", a, b, seed=7) for a, b in pairwise(edges)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.integers(2, 5))
def test_threads_change_no_bit(one, other, threads):
    """A run would depend on the number of cores of the machine it was started on."""
    start, stop = sorted((one, other))
    drawn = np.full(stop - start, np.nan, dtype=np.float32)
    draw_initial(drawn, CONFIG, "embed.weight", start, 7, threads)
    assert drawn.tobytes() == initial_slice(CONFIG, "embed.weight", start, stop, seed=7).tobytes()


def test_a_thread_that_fails_is_heard():
    """A run would start from memory that nobody has filled."""
    frozen = np.zeros(SIZE, dtype=np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"read-only|writable|writeable"):
        draw_initial(frozen, CONFIG, "embed.weight", 0, 7, threads=2)


def test_values_are_pinned():
    """The same seed would start another run after an upgrade of the code or of NumPy, or on another machine."""
    whole = initial_slice(CONFIG, "embed.weight", 0, SIZE, seed=1234)
    assert whole.dtype == np.float32
    assert [float(x).hex() for x in whole[[0, 1, CHUNK, SIZE - 1]]] == GOLDEN_ELEMENTS
    assert hashlib.blake2b(whole.astype("<f4").tobytes(), digest_size=8).hexdigest() == GOLDEN_HASH


def test_the_spread_is_the_configured_one():
    """Training would start too hot, or the residual stream would grow with depth."""
    scale = {"wo": 0.5, "w_down": 0.5}
    for name, shape in parameter_shapes(CONFIG).items():
        values = initial_slice(CONFIG, name, 0, int(np.prod(shape)), seed=3)
        if len(shape) == 1:
            assert (values == 1).all()
            continue
        std = 0.02 * scale.get(name.split(".")[-2], 1.0)
        assert abs(values.std() / std - 1) < 0.03, name
        assert abs(values.mean()) < 4 * std / np.sqrt(values.size), name


def test_seed_name_and_chunk_all_matter():
    """Layers, or seeds, would start as copies of each other."""
    layer0 = initial_slice(CONFIG, "blocks.0.attention.wq.weight", 0, 96, seed=1)
    others = [
        initial_slice(CONFIG, "blocks.1.attention.wq.weight", 0, 96, seed=1),
        initial_slice(CONFIG, "blocks.0.attention.wk.weight", 0, 96, seed=1),
        initial_slice(CONFIG, "blocks.0.attention.wq.weight", 0, 96, seed=2),
    ]
    for other in others:
        assert np.intersect1d(layer0, other).size < 3
    embed = initial_slice(CONFIG, "embed.weight", 0, 2 * CHUNK, seed=1)
    assert not np.array_equal(embed[:CHUNK], embed[CHUNK:])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 97)])
def test_a_range_outside_the_parameter_is_refused(start, stop):
    """A wrong shard boundary would go unnoticed."""
    with pytest.raises(AssertionError, match=r"norm.weight: \["):
        initial_slice(CONFIG, "norm.weight", start, stop, seed=1)


@pytest.mark.parametrize("step", [1, 2])
def test_an_engine_gets_the_same_values_by_any_way(step, monkeypatch):
    """A run on a GPU, whose weights go by way of a buffer, would start elsewhere than the same run on a CPU."""
    monkeypatch.setattr(start, "BUFFER", CHUNK // 2 + 1)
    config = Config.model_validate(
        {
            "run": {"name": "t", "dir": "t", "seed": 7},
            "model": CONFIG.model_dump(),
            "data": {"path": "d", "tokenizer": {"kind": "sentencepiece", "vocab_size": CONFIG.vocab_size}},
            "batch": {"global_sequences": 1, "micro": 1, "seq_len": 64},
            "schedule": {"name": "constant", "peak": 1e-3, "horizon": "1 steps"},
        }
    )
    source = start.InitialValues(config, threads=2)
    begin, stop = 5, SIZE - 3
    out = torch.full((step * (stop - begin),), torch.nan)[::step]
    with torch.no_grad():
        source.read_into(out, "embed.weight", "weight", begin)
    wanted = initial_slice(CONFIG, "embed.weight", begin, stop, seed=7)
    assert out.contiguous().numpy().tobytes() == wanted.tobytes()
    assert source.read("embed.weight", "weight", begin, stop).numpy().tobytes() == wanted.tobytes()
    source.read_into(out, "embed.weight", "exp_avg", begin)
    assert not out.any()
