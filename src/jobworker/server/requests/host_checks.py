"""Checks whether this host can serve a job's request at all, before the job is made.

A value that the protocol allows may be more than the host has. The client then gets the path of
that value and what it may ask for.
"""

from jobworker.core_list import parse_cores
from jobworker.errors import InvalidParams
from jobworker.model.job import JobSpec
from jobworker.model.units import MEBIBYTE, format_mebibytes
from jobworker.sandbox.service.host_facts import HostFacts


def check_runtime(name: str, known: frozenset[str]) -> None:
    """Raise InvalidParams if a job asks for a runtime that the configuration does not have."""
    if name and name not in known:
        raise _refused(
            "runtime",
            f"there is no {name!r} here",
            remedy="ask for one of " + ", ".join(sorted(known))
            if known
            else "ask for none: the server's configuration has no [runtimes]",
        )


def _refused(path: str, problem: str, *, remedy: str) -> InvalidParams:
    """The error for a value of a job's spec that this host cannot serve; its path is a fault."""
    return InvalidParams(
        f"cannot run the command: {path}: {problem}",
        remedy=remedy,
        data={"faults": [{"path": f"job.{path}", "problem": problem}]},
    )


def check_against_host(job: JobSpec, host: HostFacts) -> None:
    """Raise InvalidParams if a job asks for cores or memory that this host does not have."""
    limits = job.limits
    cpu, memory = limits.cpu_percent or 0, limits.memory_bytes or 0
    if cpu > 100 * host.cpus:
        raise _refused(
            "limits.cpu_percent",
            f"{cpu} is more than {100 * host.cpus}, all of this host's {host.cpus} cores",
            remedy="ask for less, or for 0 (no limit)",
        )
    if memory > host.memory_bytes:
        whole = host.memory_bytes - host.memory_bytes % MEBIBYTE
        raise _refused(
            "limits.memory_bytes",
            f"{format_mebibytes(memory)} is more than {format_mebibytes(whole)}, all of this "
            "host's memory",
            remedy="ask for less, or for 0 (no limit)",
        )
    missing = parse_cores(job.cpu_cores) - host.cores
    if missing:
        there = ", ".join(map(str, sorted(host.cores)))
        raise _refused(
            "cpu_cores",
            f"this host has no core {min(missing)} for jobs; it has {there}",
            remedy="choose among them",
        )
