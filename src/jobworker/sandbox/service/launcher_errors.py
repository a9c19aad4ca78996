"""The errors of the service's exchange with the launcher. None is about a job's command."""

import errno

from jobworker.errors import (
    JobworkerError,
    LauncherGone,
    LauncherSilent,
    OutOfDescriptors,
    SandboxError,
)
from jobworker.model.job import JobId

_LOST = frozenset({errno.EPROTO, errno.EMFILE})
"""The errors of replies that this process could not use."""


def out_of_descriptors(*, of_reply: bool = False) -> OutOfDescriptors:
    """The error for a request for which this process can open no more descriptors.

    `of_reply`: the launcher has served the request, and this process had no room for the
    descriptors of the reply. Otherwise the request was not sent.
    """
    return OutOfDescriptors(
        "cannot serve the request: the service has no file descriptor left for it",
        remedy="try again later, or raise the service's LimitNOFILE",
        data={"step": "reply", "errno": errno.EMFILE} if of_reply else {},
    )


def launcher_gone() -> LauncherGone:
    """The error for a request after the launcher's end."""
    return LauncherGone(
        "cannot serve the request: the launcher has ended", remedy="restart the service"
    )


def launcher_silent(job: JobId | None = None) -> LauncherSilent:
    """The error for a request that a silent launcher does not answer.

    `job` is the job that the request is to start, if it is one. It starts when the launcher
    answers again.
    """
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
    """The error for a request that was not sent before the end of the service."""
    return LauncherSilent(
        "cannot serve the request: the service is shutting down, and sends no more requests",
        remedy="try again once the next service is there",
        data={"sent": False},
    )


def unanswered() -> LauncherSilent:
    """The error for a request that was sent and got no reply before the end of the service."""
    return LauncherSilent(
        "cannot tell what becomes of the request: the service is shutting down, and the "
        "launcher has not answered",
        remedy="see what became of it once the next service is there",
    )


def reply_was_lost(error: JobworkerError) -> bool:
    """Whether the launcher may have served a request that failed with this error."""
    return error.data.get("step") == "reply" and error.data.get("errno") in _LOST


def malformed(fault: object) -> SandboxError:
    """The error for a reply that the launcher's protocol does not allow; `fault` names the field.

    The request may have had its effect.
    """
    return SandboxError(
        f"cannot serve the request: the launcher does not keep to the protocol: {fault}",
        remedy="report this fault, with the versions of service and launcher",
        data={"step": "reply", "errno": errno.EPROTO, "detail": str(fault)},
    )
