"""The processes that measure jobs' kernel memory: the code that runs in one, and its outcome.

A hostile job may make such a process fail or block. So the process writes the id of the job that it
inspects to a memfd that it shares with the launcher. Then the launcher knows which job it was.

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
from jobworker.sandbox.kernel_memory.measure import Measurement
from jobworker.sandbox.kernel_memory.search import SearchResult

_NUMBER = struct.Struct("=Q")


class LookedAt:
    """The job that a process inspects now, readable even after the process has died."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("looked-at", os.MFD_CLOEXEC)
        """The memfd. The process has it at the same descriptor number."""

    def tell(self, job: int) -> None:
        """Called in the process before it inspects a job; 0 is for no job."""
        os.pwrite(self.memory, _NUMBER.pack(job), 0)

    @property
    def job(self) -> int:
        """The job that the process has last written; 0 for none."""
        said = os.pread(self.memory, _NUMBER.size, 0)
        return int(_NUMBER.unpack(said)[0]) if said else 0

    def close(self) -> None:
        """Close the memfd."""
        os.close(self.memory)


def in_its_own_proc(work: Callable[[], Measurement | SearchResult]) -> channel.Message:
    """Do the work in the chore's process with a /proc of its own, and return its outcome.

    The kernel keeps an entry for each name that is looked up in a /proc, and drops the entries of a
    job when the job is reaped. In the launcher's /proc the launcher would have to wait for that. A
    /proc of its own goes with this process.
    """
    with contextlib.suppress(OSError):  # some kernels forbid it to ordinary users: reaping is slow
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
    """The seconds of a processor that a chore has used, for `kernel_memory.pace`.

    If the chore has sent no outcome, the largest value that is possible: `MOST_SECONDS`.
    """
    used = outcome.get("used_seconds", MOST_SECONDS)
    assert isinstance(used, int | float)
    return used
