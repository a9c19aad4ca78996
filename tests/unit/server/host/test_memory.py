"""What was freed goes back to the system: in a process of its own, whose memory is its own."""

import subprocess
import sys
from time import thread_time

import pytest
import trio
import trio.testing

from jobworker.server.host import memory
from jobworker.server.host.malloc import give_back_freed_memory
from jobworker.server.host.memory import LONGEST_PAUSE_SECONDS, MAX_SEARCH_SECONDS, keep_small

PROGRAM = """
import gc
import trio
from threading import Barrier, Thread
from time import sleep
from jobworker.server.host.malloc import keep_freed_memory
from jobworker.server.host.memory import keep_small, resident_bytes

async def below_a_block_in_use():
    held = [bytes([1]) * 300_000 for _ in range(300)]
    stays.append(held.pop())  # it lies above the others
    return resident_bytes()

async def in_threads():
    met, measured = Barrier(9), Barrier(9)
    def work():
        held = [bytes([1]) * 20_000 for _ in range(600)]
        met.wait()
        measured.wait()
        del held
        sleep(60)
    for _ in range(8):
        Thread(target=work, daemon=True).start()
    met.wait()
    peak = resident_bytes()
    measured.wait()
    return peak

async def in_cycles():
    for _ in range(300):
        cycle = [bytes([1]) * 300_000]
        cycle.append(cycle)
    return resident_bytes()

stays = []

async def main():
    gc.disable()  # nothing else is made that would start a search
    await trio.to_thread.run_sync(int)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_small)
        await trio.testing.wait_all_tasks_blocked()
        before = resident_bytes()
        peak = await {made}()
        assert peak > before + 50_000_000, "the control"
        with trio.move_on_after(20):
            while resident_bytes() > before + 20_000_000:
                await trio.sleep(0.05)
        kept = resident_bytes() - before
        assert kept < 20_000_000, kept
        nursery.cancel_scope.cancel()

import trio.testing
keep_freed_memory(16 << 20, 2 << 20)  # as the service does
trio.run(main)
"""


@pytest.mark.parametrize("made", ["below_a_block_in_use", "in_threads", "in_cycles"])
def test_memory_that_was_freed_is_given_back(made: str) -> None:
    program = PROGRAM.format(made=made)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


async def test_search_for_cycles_that_takes_long_is_not_repeated_soon(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    searches = 0

    def slow() -> None:
        nonlocal searches
        searches += 1
        until = thread_time() + 2 * MAX_SEARCH_SECONDS
        while thread_time() < until:
            pass

    monkeypatch.setattr("gc.collect", slow)
    with trio.move_on_after(20 * LONGEST_PAUSE_SECONDS):
        await keep_small()
    assert searches == 1, "by the clock that the search was measured by no minute has passed"


async def test_memory_is_given_back_soon_after_it_was_freed_however_long_it_was_held(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """While a flood goes on nothing is gained, so the pauses get long; and then it ends."""
    held, free, given_back = 0, 0, list[float]()

    async def give_back(work: object) -> None:
        nonlocal free
        assert work is give_back_freed_memory
        await trio.lowlevel.checkpoint()
        free = 0
        given_back.append(autojump_clock.current_time())

    monkeypatch.setattr(memory, "resident_bytes", lambda: 70_000_000 + held + free)
    monkeypatch.setattr(memory, "freed_bytes", lambda: 1_000_000 + free)
    monkeypatch.setattr(memory, "in_thread", give_back)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_small)
        await trio.sleep(0.5)
        held = 20_000_000
        await trio.sleep(3 * LONGEST_PAUSE_SECONDS)
        held, free, ended_at = 0, held, autojump_clock.current_time()
        looks = len(given_back)
        await trio.sleep(2)
        assert free == 0
        assert given_back[looks] <= ended_at + 1
        nursery.cancel_scope.cancel()
    assert given_back[looks - 1] - given_back[looks - 2] == LONGEST_PAUSE_SECONDS, "the control"


def test_what_malloc_has_free_is_told() -> None:
    program = """
from jobworker.server.host.malloc import freed_bytes, keep_freed_memory
keep_freed_memory(16 << 20, 2 << 20)
held = [bytes([1]) * 300_000 for _ in range(100)]
stays = held.pop()
before = freed_bytes()
del held
freed = freed_bytes() - before
assert 29_000_000 < freed < 40_000_000, freed
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


SEARCHED = """
import gc
import jobworker.server.service
from jobworker.server.host.memory import settle

assert len(gc.get_objects()) > 10_000
settle()
assert len(gc.get_objects()) < 1000
"""


def test_what_modules_made_is_searched_for_cycles_no_more() -> None:
    subprocess.run([sys.executable, "-c", SEARCHED], check=True, timeout=60)
