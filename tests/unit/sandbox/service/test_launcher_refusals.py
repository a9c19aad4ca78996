"""What a failed start is told as: the remedy fits the cause, not only the step."""

import errno

import pytest

from jobworker.sandbox.chores import CROWDED
from jobworker.sandbox.protocol.replies import Refusal
from jobworker.sandbox.service.launcher_refusals import ENOTSUPP, explain


@pytest.mark.parametrize(
    ("step", "code", "remedy"),
    [
        ("enter-user-namespace", errno.EPERM, "allow user namespaces"),
        ("enter-user-namespace", 0, "allow user namespaces"),
        ("enter-user-namespace", errno.EAGAIN, "TasksMax="),
        ("spawn", errno.EAGAIN, "TasksMax="),
        ("spawn", errno.EMFILE, "LimitNOFILE="),
        ("spawn", errno.ENFILE, "fs.file-max"),
        ("filter-system-calls", ENOTSUPP, "net.core.bpf_jit_limit"),
        ("enter-network", errno.ENOMEM, "no memory"),
        ("enter-network", errno.ENODEV, "/dev/net/tun"),
        ("limits", errno.ENOMEM, "--max-memory"),
        ("limits", errno.EINVAL, "control groups"),
        ("change-directory", errno.ENOENT, "that exists"),
        ("change-directory", errno.EACCES, "let the job's user"),
        ("place", 0, "worker.max_concurrent_jobs"),
        ("volume", errno.ETOOMANYREFS, "stop the jobs that keep them"),
        ("volume", errno.EBUSY, "`worker-cli list --json` has the volumes of each"),
    ],
)
def test_remedy_is_for_what_the_kernel_said(step: str, code: int, remedy: str) -> None:
    error = explain(Refusal(step, code, "/x"))
    assert remedy in (error.remedy or "")
    others = {"allow user namespaces", "TasksMax=", "/dev/net/tun", "--max-memory"} - {remedy}
    assert not any(other in (error.remedy or "") for other in others)


@pytest.mark.parametrize(
    ("program", "remedy"),
    [
        ("nosuch", "check the spelling; programs are"),
        ("echo hello", "give program and arguments apart"),
        (" ", "give program and arguments apart"),
        ("./x", "files of the client's machine are not there; programs are"),
    ],
)
def test_program_that_is_not_there_is_told_in_quotes(program: str, remedy: str) -> None:
    error = explain(Refusal("execute", errno.ENOENT, program))
    assert error.message == f"cannot run '{program}': no such program inside the job's root"
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("execute", errno.ENOENT),
        ("execute", errno.E2BIG),
        ("execute", errno.EACCES),
        ("change-directory", errno.ENOENT),
    ],
)
def test_what_is_long_is_told_in_part(step: str, code: int) -> None:
    error = explain(Refusal(step, code, "/begin" + "x" * 100_000))
    assert "/beginxxx" in error.message
    assert len(error.message) < 500


@pytest.mark.parametrize(
    ("code", "why", "remedy"),
    [
        (CROWDED, "several are being made", "try again"),
        (errno.EAGAIN, "no process", "TasksMax="),
        (errno.ENOMEM, "memory", "end something"),
        (errno.ENFILE, "open files", "fs.file-max"),
        (errno.EMFILE, "descriptors", "LimitNOFILE="),
    ],
)
def test_volumes_that_cannot_be_listed_now_are_told_why(code: int, why: str, remedy: str) -> None:
    error = explain(Refusal("volume", code, ""))
    assert error.name == "busy"
    assert error.message.startswith("cannot list the volumes: ")
    assert why in error.message
    assert remedy in (error.remedy or "")


def test_reply_that_could_not_be_sent_is_told_as_that() -> None:
    error = explain(Refusal("reply", errno.EMFILE, "Too many open files"))
    assert error.name == "busy"
    assert "the launcher's reply" in error.message
    assert "LimitNOFILE=" in (error.remedy or "")


@pytest.mark.parametrize(
    ("step", "code", "message", "remedy"),
    [
        ("launcher", 0, "incident 5", "the launcher's log"),
        ("request", errno.EIO, "Input/output error", "the launcher's log"),
        ("request", errno.EMFILE, "Too many open files", "LimitNOFILE="),
    ],
)
def test_request_that_starts_nothing_is_not_told_as_a_start(
    step: str, code: int, message: str, remedy: str
) -> None:
    error = explain(Refusal(step, code, "incident 5"))
    assert error.message == f"cannot serve the request: {message}"
    assert remedy in (error.remedy or "")


def test_volume_that_is_not_there_is_told_by_its_name() -> None:
    error = explain(Refusal("open-volume", errno.ENOENT, "cache"))
    assert str(error).endswith(
        "there is no such volume; see `worker-cli volume list`, or create it"
    )
    error = explain(Refusal("volume", errno.ENOENT, "cache"))  # to remove it
    assert str(error).endswith("there is no such volume; see `worker-cli volume list`")
    error = explain(Refusal("open-volume", errno.ENOENT, "/dev/loop-control"))
    assert "no such volume" not in str(error)
