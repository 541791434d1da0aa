"""What does the server that ranks are forked from do once, so that no rank needs to?

Beside the imports: DeepSpeed runs a compiler to find out which of its operators it could build, and ZeRO-3 collects
garbage while it starts, which takes long where much is imported.
"""

import gc
import os

import deepspeed.ops
import deepspeed.runtime.engine
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import pytest  # noqa: F401
import torch._dynamo  # noqa: F401

import llmtrain.cli
import llmtrain.engines.deepspeed
import llmtrain.engines.fsdp
import llmtrain.train.run

llmtrain.cli.FIRST_WORD_S = 0.0  # no launcher ends ranks that are forked here
if os.environ.get("DS_ACCELERATOR") == "cpu":  # elsewhere it would start the device in the server
    assert deepspeed.ops.__compatible_ops__
gc.freeze()
