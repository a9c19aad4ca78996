"""What a failed start means: the job has not run, may be tried again, or is undecided."""

import errno

import pytest

from jobworker.errors import (
    InvalidParams,
    JobworkerError,
    LauncherGone,
    LauncherSilent,
    OutOfDescriptors,
    SandboxError,
)
from jobworker.jobs.start_failures import has_not_run, may_pass, undecided
from jobworker.model.job import JobId


def refused(**data: object) -> SandboxError:
    return SandboxError("cannot start the job", data=data)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refused(step="start", errno=errno.ECANCELED), True),
        (refused(step="mount", errno=errno.ECANCELED), False),
        (refused(step="start", errno=errno.EAGAIN), False),
        (LauncherSilent("no answer", data={"sent": False}), True),
        (LauncherSilent("no answer", data={"sent": True}), False),
        (LauncherSilent("no answer"), False),
        (LauncherGone("gone"), False),
    ],
)
def test_only_a_start_that_was_given_up_or_never_sent_has_certainly_not_run(
    error: JobworkerError, expected: bool
) -> None:
    assert has_not_run(error) is expected


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENFILE])
def test_want_of_processes_or_descriptors_may_pass(number: int) -> None:
    assert may_pass(refused(errno=number))


class _Particular(SandboxError):
    """A fault of the sandbox that has a class of its own."""


@pytest.mark.parametrize(
    "error",
    [
        refused(errno=errno.ENOENT),
        refused(),
        _Particular("cannot start the job", data={"errno": errno.EAGAIN}),
        InvalidParams("no such runtime", data={"errno": errno.EAGAIN}),
        LauncherGone("gone"),
    ],
)
def test_other_failures_are_final(error: JobworkerError) -> None:
    assert not may_pass(error)


def test_want_of_descriptors_passes_unless_the_program_may_have_run() -> None:
    assert may_pass(OutOfDescriptors("no descriptor is left"))
    assert may_pass(OutOfDescriptors("no descriptor is left", data={"may_have_run": False}))
    assert not may_pass(OutOfDescriptors("no descriptor is left", data={"may_have_run": True}))


def test_undecided_start_names_its_job_and_warns_of_a_second_run() -> None:
    error = undecided(JobId(7))
    assert error.data["job"] == 7
    assert "job 7" in error.message
    assert "worker-cli status 7" in error.remedy
    assert not has_not_run(error), "nobody knows"
