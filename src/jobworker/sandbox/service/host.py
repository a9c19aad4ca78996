"""Facts about this host that requests are measured against."""

import os

from attrs import frozen


@frozen(kw_only=True)
class HostFacts:
    """What there is at most."""

    cpus: int
    memory_bytes: int
    cores: frozenset[int]
    """The numbers of the cores that this process may run on."""


def read_host_facts() -> HostFacts:
    """The host as it is now: sysconf(3)."""
    return HostFacts(
        cpus=os.cpu_count() or 1,
        cores=frozenset(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
