"""Resource limits of the service's process (getrlimit(2)): raised as far as possible."""

import resource

from jobworker.descriptor_limit import settable_limits


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard limit, and return that number."""
    hard = descriptor_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def lift_file_size_limit() -> str:
    """Let this process and its children write files of any size.

    Returns a warning if a limit stays, else "". If a file reaches the limit, write(2) fails with
    EFBIG, which looks like a full disk to the code above.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return ""
    unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    except (OSError, ValueError):  # raising the hard limit needs CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if hard != resource.RLIM_INFINITY:
            return (
                f"no file can have more than {hard} bytes, neither jobs' output nor their disks: "
                "raise the limit (LimitFSIZE=, ulimit -f)"
            )
    return ""


def descriptor_limit() -> int:
    """How many descriptors this process, or a child of it, may open."""
    return settable_limits()[1]
