"""The service's own memory: what malloc holds free goes back, and what stays is not searched.

malloc keeps what was freed, for the next piece of output, which is fast; but it never gives back
by itself what lies below a block that is still in use, or in the arena of a thread. So after a
flood the service would stay as large as it was at its largest. Here all free pages are given back,
wherever they lie, soon after the process has grown or malloc has more that is free, and then again
less and less often, as long as there is nothing to give back.

Python searches all that it has made for cycles from time to time, in whatever turn of the loop that
may be. What modules made at the start is most of that, takes 35 ms a time, and never goes.
"""

import gc
import math
import mmap
import time
from contextlib import suppress
from pathlib import Path

import trio

from jobworker.protocol.frames import PIECE_BYTES
from jobworker.sandbox.syscalls import freed_bytes, give_back_freed_memory, keep_freed_memory
from jobworker.threads import in_thread

FREE_BYTES = 16 << 20
"""What the service keeps of the memory that it has freed."""
LOOK_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 64.0
NOTABLE_BYTES = 4 << 20
MAX_SEARCH_SECONDS = 0.005
"""Of the processor; a search for cycles that took longer is the last for the longest pause."""
_OWN = Path("/proc/self/statm")


def set_up() -> None:
    """Have malloc keep what is freed, in one arena: for the time before the first thread.

    Else each piece of output would be mapped anew. A thread that has been started already has an
    arena of its own, which all later threads then share.
    """
    keep_freed_memory(FREE_BYTES, 2 * PIECE_BYTES)


def settle() -> None:
    """Leave what there is now out of the searches for cycles: for the end of the start."""
    gc.collect()
    gc.freeze()


def resident_bytes() -> int:
    """What this process has in memory: proc(5), statm."""
    return int(_OWN.read_text().split()[1]) * mmap.PAGESIZE


async def keep_small() -> None:
    """Give memory back after the process has grown, or has freed much; never returns."""
    pause, waited, least = LOOK_SECONDS, 0.0, resident_bytes()
    smallest, freed = least, freed_bytes()
    search_at = -math.inf
    while True:
        await trio.sleep(LOOK_SECONDS)
        waited += LOOK_SECONDS
        try:
            before = resident_bytes()
        except OSError:  # the host has no descriptor for it
            continue
        smallest, free = min(smallest, before), freed
        if before > smallest + NOTABLE_BYTES:  # else there is nothing to gain by it
            free = freed_bytes()
        if before > least + NOTABLE_BYTES or free > freed + NOTABLE_BYTES:
            pause = LOOK_SECONDS
        freed = min(freed, free)
        if waited >= pause:
            if time.monotonic() >= search_at:
                began = time.thread_time()
                gc.collect()
                if time.thread_time() - began > MAX_SEARCH_SECONDS:
                    search_at = time.monotonic() + LONGEST_PAUSE_SECONDS
            await in_thread(give_back_freed_memory)
            freed = freed_bytes()
            with suppress(OSError):
                waited, least = 0.0, resident_bytes()
            fruitful = before > least + NOTABLE_BYTES
            pause = LOOK_SECONDS if fruitful else min(2 * pause, LONGEST_PAUSE_SECONDS)
