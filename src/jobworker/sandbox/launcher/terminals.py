"""How many pseudo-terminals a job may have: a part of what the kernel has for the whole host.

There are kernel.pty.max of them, less kernel.pty.reserve for the host itself. Without a bound one
job takes all, and `script`, `tmux` and `ssh` fail in every other. Where all jobs take all that they
may have, none goes short.

Standard library only. Source: Documentation/filesystems/devpts.rst.
"""

MOST, FEWEST = 64, 4
_USUAL_MAX, _USUAL_RESERVE = 4096, 1024


def share(maximum: int, reserve: int, jobs: int) -> int:
    """The terminals of one of so many jobs."""
    return max(FEWEST, min(MOST, (maximum - reserve) // jobs))


def terminals_each(jobs: int) -> int:
    """The terminals of one of so many jobs on this host."""
    return share(_setting("max", _USUAL_MAX), _setting("reserve", _USUAL_RESERVE), jobs)


def _setting(name: str, usual: int) -> int:
    try:
        with open(f"/proc/sys/kernel/pty/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):  # hidden, as in some containers
        return usual
