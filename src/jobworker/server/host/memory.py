"""The service's own memory: free pages go back to the kernel, and garbage collections stay short.

malloc keeps freed memory for the next piece of output, which is fast. But by itself it never gives
back memory below a block that is still in use, or in the arena of a thread. So after a flood the
service would stay as large as it was at its largest. This module gives back all free pages,
wherever they lie, soon after the process has grown or malloc has more free memory. While there is
nothing to give back, it tries less and less often.

Python's garbage collector searches all objects for cycles from time to time, in any turn of the
event loop. Most of these objects were made by modules at the start. A search of them takes 35 ms,
and they are never freed. So `settle` takes them out of the search.
"""

import gc
import math
import mmap
import time
from contextlib import suppress
from pathlib import Path

import trio

from jobworker.protocol.frames import PIECE_BYTES
from jobworker.server.host.malloc import freed_bytes, give_back_freed_memory, keep_freed_memory
from jobworker.threads import in_thread

FREE_BYTES = 16 << 20
"""How much freed memory malloc keeps for the service."""
LOOK_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 64.0
NOTABLE_BYTES = 4 << 20
MAX_SEARCH_SECONDS = 0.005
"""Processor time of a garbage collection; after a longer one, none follows for the longest pause.
"""
_OWN = Path("/proc/self/statm")


def set_up() -> None:
    """Have malloc keep freed memory, in one arena. Call it before the first thread starts.

    Without this, malloc would map new memory for each piece of output. A thread that runs already
    has an arena of its own, which all later threads would then share.
    """
    keep_freed_memory(FREE_BYTES, 2 * PIECE_BYTES)


def settle() -> None:
    """Take all present objects out of garbage collections. Call it at the end of the start."""
    gc.collect()
    gc.freeze()


def resident_bytes() -> int:
    """The resident memory of this process in bytes: proc(5), statm."""
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
        except OSError:  # the host has no file descriptor left
            continue
        smallest, free = min(smallest, before), freed
        if before > smallest + NOTABLE_BYTES:  # else the process has too little to give back
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
