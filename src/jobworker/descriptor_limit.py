"""How many file descriptors a process may be allowed to open: getrlimit(2), fs.nr_open of proc(5).

The kernel refuses each change of RLIMIT_NOFILE with a hard limit above fs.nr_open, also one that
leaves the hard limit as it is. An administrator may have lowered fs.nr_open after the hard limit
was set. So the hard limit to use is the lower one of the two.

Standard library only: the launcher needs it too.
"""

import contextlib
import resource

_NR_OPEN = "/proc/sys/fs/nr_open"
_USUAL = 1 << 20
"""Linux's default for fs.nr_open."""


def settable_limits() -> tuple[int, int]:
    """The soft limit on open descriptors, and the highest that setrlimit(2) accepts for both."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _USUAL
    with contextlib.suppress(OSError, ValueError), open(_NR_OPEN, encoding="ascii") as file:
        most = int(file.read())
    hard = most if hard == resource.RLIM_INFINITY else min(hard, most)
    return min(soft, hard) if soft != resource.RLIM_INFINITY else hard, hard
