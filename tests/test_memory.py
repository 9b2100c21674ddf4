"""What a long job frees goes back to the system."""

import sys
from pathlib import Path

import pytest
import torch

from icrouting.runtime.memory import give_back


def resident() -> int:
    """Kilobytes of this process's own memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise AssertionError("the kernel tells no RssAnon")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_holes_between_what_is_in_use_go_back_to_the_system():
    if not give_back():
        pytest.skip("this C library gives nothing back")
    # Small blocks, every second of which is freed: none of them ends the heap.
    blocks = [torch.ones(16_000) for _ in range(2000)]
    del blocks[::2]
    before = resident()
    give_back()
    assert resident() < before - 20_000
    assert len(blocks) == 1000
