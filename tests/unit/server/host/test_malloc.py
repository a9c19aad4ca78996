"""What malloc keeps of freed memory; `test_memory` has what it gives back."""

import resource
import subprocess
import sys

import pytest

PIECES = """
import resource
from jobworker.server.host.malloc import keep_freed_memory

{keep}
for _ in range(50):
    pieces = [bytearray(1 << 20) for _ in range(4)]
    del pieces
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(keep: str) -> int:
    """Page faults of a process that makes pieces and frees them, over and over."""
    done = subprocess.run(
        [sys.executable, "-c", PIECES.format(keep=keep)], stdout=subprocess.PIPE, check=True
    )
    return int(done.stdout)


def test_freed_memory_is_kept_for_the_next_piece() -> None:
    usual = faults("")
    if usual < 50 * 4 * (1 << 20) / resource.getpagesize() / 4:
        pytest.skip("this C library keeps what is freed by itself")
    assert faults("keep_freed_memory(16 << 20, 2 << 20)") < usual / 4
