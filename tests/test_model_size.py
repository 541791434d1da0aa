"""Counts of parameters and work."""

import subprocess
import sys

import pytest

from llmtrain.config import ModelConfig
from llmtrain.model.size import flops_per_token, matmul_parameters, parameter_count
from llmtrain.presets import PRESETS


def test_work_of_llama_7b_is_the_hand_count():
    """MFU and the predicted time of a run would be wrong."""
    config = ModelConfig(preset="llama-7b")
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 4096 * 32000
    assert matmul_parameters(config) == matrices
    assert flops_per_token(config, 2048) == 6 * matrices + 12 * 32 * 32 * 128 * 2048


def test_tying_saves_one_table_and_no_work():
    """A tied model would be planned too large or too cheap."""
    untied, tied = (ModelConfig(preset="1b", tie_embeddings=tied) for tied in (False, True))
    assert parameter_count(untied) - parameter_count(tied) == untied.vocab_size * untied.hidden_size
    assert matmul_parameters(untied) == matmul_parameters(tied)


@pytest.mark.parametrize(
    ("preset", "millions"), [("60m", 58), ("125m", 134), ("350m", 367), ("1b", 1100), ("3b", 3426)]
)
def test_presets_are_about_as_large_as_their_names(preset, millions):
    """A preset's name would mislead."""
    assert preset in PRESETS
    assert parameter_count(ModelConfig(preset=preset)) // 1_000_000 == millions


def test_counting_needs_no_torch():
    """Plans and previews would take seconds to start on a login node."""
    code = "import sys, llmtrain.model.size, llmtrain.model.initial; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
