"""Reads the facts about this host that bound what a job can ask for."""

import os

from attrs import frozen


@frozen(kw_only=True)
class HostFacts:
    """The processors and the memory of the host."""

    cpus: int
    memory_bytes: int
    cores: frozenset[int]
    """The numbers of the cores that this process may run on."""


def read_host_facts() -> HostFacts:
    """The facts as they are now: sysconf(3), sched_getaffinity(2)."""
    return HostFacts(
        cpus=os.cpu_count() or 1,
        cores=frozenset(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
