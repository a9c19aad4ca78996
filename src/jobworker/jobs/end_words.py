"""The sentences about a job's end for the detail of its record. Pure."""

from collections.abc import Iterator

from jobworker.model.job import KILLED_FOR_MEMORY, LOSSES_UNKNOWN, LOST_WRITES
from jobworker.model.lifecycle import Reason
from jobworker.sandbox.service.job_reports import JobExit


def words_of(ending: JobExit | None, reason: Reason | None) -> Iterator[str]:
    """Yield the sentences about an end for the record's detail."""
    if ending is None:
        yield "the launcher ended while the job was alive"
        return
    if words := memory_words(ending, reason):
        yield words
    for place in ending.lost:
        where = f"the volume {place}" if place else "its disk"
        yield f"some of what it wrote to {where} {LOST_WRITES}"
    for name in ending.unseen:
        yield f"whether all that it wrote to the volume {name} is kept {LOSSES_UNKNOWN}"


def memory_words(ending: JobExit, reason: Reason | None) -> str:
    """The detail of an end with kills for want of memory, if the job's own limit was not the cause.

    Else "".
    """
    if ending.want == "kernel" and reason is Reason.OOM:
        return (
            f"it was {KILLED_FOR_MEMORY}: it held more of the kernel's own than a job may, "
            "in sockets or locks on files that its memory limit does not count"
        )
    if ending.want != "host":
        return ""
    count = ending.usage.oom_kills if ending.usage is not None else "some"
    some = f"{count} of its processes {'was' if count == 1 else 'were'}"
    who = "it was" if reason is Reason.OOM else some
    return f"{who} {KILLED_FOR_MEMORY}: the host, or a control group above the job's, had none left"
