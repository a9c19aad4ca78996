"""The bound on the pseudo-terminals of a job: an equal part of what the host has for all jobs.

The host has kernel.pty.max of them, of which kernel.pty.reserve are for the host itself. Without a
bound one job could take all, and `script`, `tmux` and `ssh` would fail in every other job. With
equal parts each job can have its part even if all others take theirs.

Standard library only. Source: Documentation/filesystems/devpts.rst.
"""

MOST, FEWEST = 64, 4
_USUAL_MAX, _USUAL_RESERVE = 4096, 1024


def share(maximum: int, reserve: int, jobs: int) -> int:
    """The terminals for each of `jobs` jobs, between `FEWEST` and `MOST`."""
    return max(FEWEST, min(MOST, (maximum - reserve) // jobs))


def terminals_each(jobs: int) -> int:
    """The terminals for each of `jobs` jobs on this host: see `share`."""
    return share(_setting("max", _USUAL_MAX), _setting("reserve", _USUAL_RESERVE), jobs)


def _setting(name: str, usual: int) -> int:
    try:
        with open(f"/proc/sys/kernel/pty/{name}") as file:
            return int(file.read())
    except (OSError, ValueError):  # some containers hide the file
        return usual
