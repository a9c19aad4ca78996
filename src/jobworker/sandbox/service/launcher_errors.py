"""Errors of the service's conversation with the launcher: none of them is about a job's command."""

import errno

from jobworker.errors import (
    JobworkerError,
    LauncherGone,
    LauncherSilent,
    OutOfDescriptors,
    SandboxError,
)
from jobworker.model.job import JobId


def out_of_descriptors() -> OutOfDescriptors:
    """The error for a request that this process has no descriptor for."""
    return OutOfDescriptors(
        "cannot serve the request: the service has no file descriptor left for it",
        remedy="try again later, or raise the service's LimitNOFILE",
    )


def launcher_gone() -> LauncherGone:
    """The error for a request after the launcher's end."""
    return LauncherGone(
        "cannot serve the request: the launcher has ended", remedy="restart the service"
    )


def launcher_silent(job: JobId | None = None) -> LauncherSilent:
    """The error for a request that a silent launcher keeps waiting; `job` goes on when it can."""
    if job is None:
        return LauncherSilent(
            "cannot serve the request: the launcher does not answer",
            remedy="see what holds it (ps, systemctl status worker-launcher); it goes on by itself",
        )
    return LauncherSilent(
        f"cannot tell what becomes of job {job}: the launcher does not answer",
        remedy=f"do not run it again: job {job} goes on when the launcher does; "
        f"see `worker-cli status {job}`, or stop it",
        data={"job": job},
    )


def not_sent() -> LauncherSilent:
    """The error for a request that did not go out before the service's end."""
    return LauncherSilent(
        "cannot serve the request: the service is shutting down, and the launcher takes none",
        remedy="try again once the next service is there",
        data={"sent": False},
    )


def unanswered() -> LauncherSilent:
    """The error for a request that went out and had no reply before the service's end."""
    return LauncherSilent(
        "cannot tell what becomes of the request: the service is shutting down, and the "
        "launcher has not answered",
        remedy="see what became of it once the next service is there",
    )


def reply_was_lost(error: JobworkerError) -> bool:
    """Whether a request failed by this though the launcher may have served it."""
    is_malformed = error.data.get("step") == "reply" and error.data.get("errno") == errno.EPROTO
    return is_malformed or isinstance(error, OutOfDescriptors)


def malformed(fault: object) -> SandboxError:
    """The error for a reply that the launcher's protocol does not allow: `fault` names the field.

    The request may have had its effect.
    """
    return SandboxError(
        f"cannot serve the request: the launcher does not keep to the protocol: {fault}",
        remedy="report this fault, with the versions of service and launcher",
        data={"step": "reply", "errno": errno.EPROTO, "detail": str(fault)},
    )
