"""The numbers of a scope: a job's limits, what the job has used, and which memory was short.

Pure, standard library only.
"""

from typing import Literal, NamedTuple

Want = Literal["", "limit", "host", "kernel"]
"""Which memory was missing when processes of a job were killed. "": no process was killed.
"limit": memory within the job's own limit. "host": memory of the host or of a group above.
"kernel": memory of the kernel (`sandbox.launcher.kernel_watch`)."""


class ScopeLimits(NamedTuple):
    """The limits of a job; 0 is no limit. The caller has to validate the ranges."""

    cpu_percent: int = 0  # of one core: 200 is two cores
    memory_bytes: int = 0  # hard, swap included
    io_bps: int = 0  # bytes a second, reads and writes each, on every whole block device
    pids: int = 0  # processes and threads
    cores: str = ""  # the cores to run on, such as "0-3,5"; "" is all


class ScopeUsage(NamedTuple):
    """What a job has used since arm(). A field is 0 if its controller is not in use."""

    cpu_ns: int = 0
    memory_bytes: int = 0  # now
    memory_peak_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    pids: int = 0  # now
    throttled_ns: int = 0  # waiting for the CPU limit's next period, all cores together
    oom_kills: int = 0
