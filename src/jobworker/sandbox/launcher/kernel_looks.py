"""The processes that look at jobs' kernel memory: what runs in one, and what it leaves behind.

A process may die of what it meets at a job, so it tells at which job it is by a memory file that
the launcher shares with it.

Standard library only.
"""

import contextlib
import os
import struct
import time
from collections.abc import Callable

from jobworker.sandbox import channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.chores import MOST_SECONDS
from jobworker.sandbox.kernel_memory.measure import Measured
from jobworker.sandbox.kernel_memory.search import Found

_NUMBER = struct.Struct("=Q")


class LookedAt:
    """The job that a process looks at, which is known whatever becomes of the process."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("looked-at", os.MFD_CLOEXEC)
        """The process has it at the same number."""

    def tell(self, job: int) -> None:
        """In the process: what comes now is this job's, or with 0 no job's."""
        os.pwrite(self.memory, _NUMBER.pack(job), 0)

    @property
    def job(self) -> int:
        """The latest."""
        said = os.pread(self.memory, _NUMBER.size, 0)
        return int(_NUMBER.unpack(said)[0]) if said else 0

    def close(self) -> None:
        """Let go of it."""
        os.close(self.memory)


def in_its_own_proc(work: Callable[[], Measured | Found]) -> channel.Message:
    """In a process: with a /proc of its own, which goes with it.

    What is looked up in the launcher's, the launcher would have to forget when it collects the job.
    """
    with contextlib.suppress(OSError):  # a kernel that lets no ordinary user do it: slower, then
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount("proc", "/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
    outcome: channel.Message = {
        name: list(value.items() if isinstance(value, dict) else value)
        if isinstance(value, dict | frozenset)
        else value
        for name, value in work()._asdict().items()
    }
    return {**outcome, "used_seconds": time.process_time()}


def used_by(outcome: channel.Message) -> float:
    """What a process has used of a processor; one that had to be ended, as long as it could."""
    used = outcome.get("used_seconds", MOST_SECONDS)
    assert isinstance(used, int | float)
    return used
