"""What was freed goes back to the system: in a process of its own, whose memory is its own."""

import subprocess
import sys

PROGRAM = """
import trio
from jobworker.sandbox.syscalls import keep_freed_memory
from jobworker.server.memory import keep_small, resident_bytes

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_small)
        await trio.testing.wait_all_tasks_blocked()
        before = resident_bytes()
        held = [bytes([1]) * 300_000 for _ in range(300)]
        last = held.pop()  # it lies above the others and stays
        assert resident_bytes() > before + 80_000_000
        held.clear()
        with trio.fail_after(30):
            while resident_bytes() > before + 20_000_000:
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
        assert last

import trio.testing
keep_freed_memory(16 << 20, 2 << 20)  # as the service does
trio.run(main)
"""


def test_memory_that_was_freed_below_a_block_in_use_is_given_back() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)


SEARCHED = """
import gc
import jobworker.server.service
from jobworker.server.memory import settle

assert len(gc.get_objects()) > 10_000
settle()
assert len(gc.get_objects()) < 1000
"""


def test_what_modules_made_is_searched_for_cycles_no_more() -> None:
    subprocess.run([sys.executable, "-c", SEARCHED], check=True, timeout=60)
