"""What a client reads where the launcher does not answer, and what may have been served."""

import errno

import pytest

from jobworker.errors import (
    JobworkerError,
    LauncherGone,
    LauncherSilent,
    OutOfDescriptors,
    SandboxError,
)
from jobworker.model.job import JobId
from jobworker.sandbox.service import launcher_errors as errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.out_of_descriptors(), OutOfDescriptors),
        (errors.launcher_gone(), LauncherGone),
        (errors.launcher_silent(), LauncherSilent),
        (errors.launcher_silent(JobId(7)), LauncherSilent),
        (errors.not_sent(), LauncherSilent),
        (errors.unanswered(), LauncherSilent),
        (errors.malformed("pid is no integer"), SandboxError),
    ],
)
def test_error_says_what_cannot_be_done_why_and_what_to_do(
    error: JobworkerError, kind: type[JobworkerError]
) -> None:
    assert type(error) is kind
    assert error.message.startswith("cannot ")
    assert ": " in error.message
    assert error.remedy


def test_silence_over_a_start_names_the_job_that_goes_on() -> None:
    error = errors.launcher_silent(JobId(7))
    assert error.data == {"job": 7}
    assert "do not run it again: job 7 goes on" in error.remedy
    assert "job" not in errors.launcher_silent().data


def test_request_that_was_not_sent_is_told_apart_from_one_without_an_answer() -> None:
    assert errors.not_sent().data == {"sent": False}
    assert "sent" not in errors.unanswered().data


@pytest.mark.parametrize(
    ("error", "was_lost"),
    [
        (errors.out_of_descriptors(of_reply=True), True),
        (errors.out_of_descriptors(), False),
        (errors.malformed("pid is no integer"), True),
        (errors.launcher_gone(), False),
        (errors.not_sent(), False),
        (SandboxError("cannot", data={"step": "reply", "errno": errno.ENOENT}), False),
        (SandboxError("cannot", data={"step": "mount", "errno": errno.EPROTO}), False),
    ],
)
def test_reply_was_lost_if_it_came_and_could_not_be_read(
    error: JobworkerError, was_lost: bool
) -> None:
    assert errors.reply_was_lost(error) == was_lost


def test_reply_that_does_not_fit_is_told_with_the_name_of_its_field() -> None:
    error = errors.malformed("pid is no integer")
    assert error.message.endswith("the launcher does not keep to the protocol: pid is no integer")
    assert error.data["detail"] == "pid is no integer"
