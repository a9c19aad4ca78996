"""Parts of the launcher's messages to the service: the state of a job, and why a start failed.

Standard library only.
"""

import errno
import time
from collections.abc import Callable, Sequence

from jobworker.errors import JobworkerError
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.hierarchy import ScopeUsage
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.protocol.replies import HowEnded, JobEntry

Tell = Callable[[channel.Message, Sequence[int]], None]
"""Sends a message with descriptors to the service."""

DIED: channel.Message = {"step": "prepare", "errno": 0, "detail": "the process ended"}
TOO_FEW_DESCRIPTORS: channel.Message = {
    "step": "prepare",
    "errno": errno.EMFILE,
    "detail": "the launcher has no descriptors left for what the job's process has made",
}
TOO_LITTLE_MEMORY: channel.Message = {
    "step": "limits",
    "errno": errno.ENOMEM,
    "detail": "the memory limit leaves no room for a start",
}
NO_MEMORY_ABOVE: channel.Message = {
    "step": "memory",
    "errno": errno.ENOMEM,
    "detail": "the host, or a control group above the job's, has no memory left",
}

GIVEN_UP: channel.Message = {
    "step": "start",
    "errno": errno.ECANCELED,
    "detail": "its start was given up, and its program was not executed",
}
MAY_HAVE_RUN: channel.Message = {
    "step": "start",
    "errno": errno.ETIMEDOUT,
    "detail": "its start was given up; its program may have begun to run",
}


def too_long(held: str, seconds: float) -> channel.Message:
    """The failure of a start that took longer than `seconds`; `held` names what was not done."""
    return {"step": "start", "errno": errno.ETIMEDOUT, "detail": f"{held} within {seconds:.0f} s"}


def job_entry(child: Child) -> JobEntry:
    """The state of a job, for a service that takes it over. The job's pipes are sent apart."""
    assert child.job is not None
    usage, is_measured = measured(child)
    return JobEntry(
        job=child.job,
        pid=child.pid,
        age_seconds=time.monotonic() - child.started_at,
        ended_seconds_ago=since_end(child),
        exit=how_ended(child) if child.end_is_known else None,
        usage=usage,
        measured=is_measured,
        network_end=child.network_end,
        asked=None if child.asked is None else child.asked.report(time.monotonic()),
    )


def measured(child: Child) -> tuple[ScopeUsage, bool]:
    """What a job has used, and whether that could be read.

    If it could not, the numbers are 0: an earlier version of the service accepts numbers only.
    """
    try:
        return child.usage(), True
    except OSError:
        return ScopeUsage(), False


def since_end(child: Child) -> float:
    """Seconds since a job ended. Its end is reported later, after its volumes were written out."""
    return time.monotonic() - child.ended_at


def how_ended(child: Child) -> HowEnded:
    assert child.exit is not None
    code, number = child.exit
    return HowEnded(code, number, tuple(child.lost), tuple(child.unseen), child.final_want)


def fault(incident: str) -> channel.Message:
    """The refusal of a request that met an unexpected fault; the log has it by this number."""
    why = f"an unexpected fault; the launcher's log has it as incident {incident}"
    return {"step": "launcher", "errno": 0, "detail": why}


def problem(step: str, error: OSError | JobworkerError) -> channel.Message:
    """The refusal of a request because of an error. `step` is used if the error names no step."""
    if isinstance(error, OSError):
        return {"step": step, "errno": error.errno or 0, "detail": str(error)}
    code = error.data.get("errno", 0)
    assert isinstance(code, int)
    detail = str(error.data.get("detail", error.message))
    return {"step": str(error.data.get("step", "limits")), "errno": code, "detail": detail}
