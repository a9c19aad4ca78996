"""Limits of the service's process (getrlimit(2)): raised as far as it may, and told where not."""

import resource

UNLIMITED = 1 << 20
"""Descriptors to reckon with where there is no limit: what Linux gives a process at most by
default (fs.nr_open, proc(5))."""


def raise_descriptor_limit() -> int:
    """Let this process open as many descriptors as it may at all: that number."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return descriptor_limit()


def lift_file_size_limit() -> str:
    """Let this process and those it starts write files of any size; say what limit stays, or "".

    Where a file grows to the limit write(2) fails with EFBIG, which looks like a full disk to all
    that stands above.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return ""
    unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    except (OSError, ValueError):  # not without the right to (CAP_SYS_RESOURCE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if hard != resource.RLIM_INFINITY:
            return (
                f"no file can have more than {hard} bytes, neither jobs' output nor their disks: "
                "raise the limit (LimitFSIZE=, ulimit -f)"
            )
    return ""


def descriptor_limit() -> int:
    """How many descriptors a process started from here may open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else UNLIMITED
