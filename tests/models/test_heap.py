"""The heap in a process of its own: its settings hold for the whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch
from persona_rlhf.models.heap import keep_large_blocks, return_free_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

if not keep_large_blocks():
    raise SystemExit("no glibc")
blocks = [torch.ones(1 << 18) for _ in range(300)]  # a MiB each
kept = torch.ones(1 << 18)  # above them: the heap cannot shrink past it
del blocks
before = resident()
agreed = return_free_blocks()
print(before, resident(), agreed, int(kept.sum()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the heap of glibc")
def test_free_blocks_below_a_used_one_return_to_the_system() -> None:
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    if "no glibc" in ended.stderr:
        pytest.skip("this C library is not glibc")
    before, after, agreed, kept = ended.stdout.split()
    assert (agreed, kept) == ("True", f"{1 << 18}")
    assert int(before) - int(after) > 250  # MiB; without the call they stay
