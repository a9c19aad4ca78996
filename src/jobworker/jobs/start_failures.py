"""What a failed start means for its job: it has not run, may be tried again, or is undecided."""

import errno

from jobworker.errors import JobworkerError, LauncherSilent, OutOfDescriptors, SandboxError
from jobworker.model.job import JobId

_SHORTAGES = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE})
"""Errors of a start that pass: no process, or no file descriptor, was left at that moment."""


def undecided(job: JobId) -> LauncherSilent:
    """The error of a start of which this service does not learn whether it has succeeded."""
    return LauncherSilent(
        f"cannot tell what becomes of job {job}: the service is shutting down, and the launcher "
        "has not answered",
        remedy=f"do not run it again before `worker-cli status {job}` tells what became of it",
        data={"job": job},
    )


def has_not_run(error: JobworkerError) -> bool:
    """Whether a start was given up, so that the program has certainly not run.

    Either the launcher gave it up at this service's request, or it was never sent to the launcher.
    """
    given_up = error.data.get("step") == "start" and error.data.get("errno") == errno.ECANCELED
    return given_up or error.data.get("sent") is False


def may_pass(error: JobworkerError) -> bool:
    """Whether a start failed since service or launcher lacked something at the moment.

    False if the program may have run.
    """
    if isinstance(error, OutOfDescriptors):
        return not error.data.get("may_have_run")
    return type(error) is SandboxError and error.data.get("errno") in _SHORTAGES
