"""Memory of freed tensors is kept for the next update."""

import json
import platform
import subprocess
import sys

import pytest

FAULTS = """
import json, resource, sys, torch
from llmtrain.heap import keep_freed_memory

def update():
    kept = [torch.ones(2**20) for _ in range(16)]  # 64 MiB, as the activations of blocks
    torch.ones(2**23).sum()  # 32 MiB, as a chunk of logits

def faults():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        update()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin) / 5

update()
before = faults()
keep_freed_memory()
update()
print(json.dumps([before, faults()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_an_update_reuses_the_memory_of_the_last_one() -> None:
    """Every update would fault its activations in page by page."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before > 8_000  # at least the 32 MiB, in pages of 4 KiB
    assert after < 100
