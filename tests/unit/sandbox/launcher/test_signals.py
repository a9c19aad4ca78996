"""Which signals reach a job's first process, and which ends that were asked for are kept."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from jobworker.sandbox.launcher.child import Child, ChildExit
from jobworker.sandbox.launcher.signals import deliver, keep_end_request
from jobworker.sandbox.protocol.end_requests import EndRequest, EndRequestReport

from .conftest import StartChild

HOUR_MS = 3_600_000


def kept(child: Child) -> EndRequestReport:
    assert child.asked is not None
    return child.asked.report(time.monotonic())


def end_of(child: Child) -> os.waitid_result:
    ended = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended


def test_end_that_was_asked_for_is_kept_with_its_signal(start_child: StartChild) -> None:
    child = start_child()
    keep_end_request(child, EndRequest("stop", HOUR_MS), signal.SIGTERM)
    assert kept(child).cause == "stop"
    assert kept(child).signals == (signal.SIGTERM,)
    assert 3500 < kept(child).kill_in_seconds <= 3600


def test_first_cause_and_earliest_kill_stay(start_child: StartChild) -> None:
    child = start_child()
    keep_end_request(child, EndRequest("stop", HOUR_MS), signal.SIGTERM)
    keep_end_request(child, EndRequest("timeout", 2 * HOUR_MS), signal.SIGINT)
    assert kept(child).cause == "stop"
    assert kept(child).signals == (signal.SIGINT, signal.SIGTERM)
    assert kept(child).kill_in_seconds <= 3600


def test_kill_at_once_is_kept_as_overdue(start_child: StartChild) -> None:
    child = start_child()
    keep_end_request(child, EndRequest("stop", HOUR_MS), signal.SIGKILL, at_once=True)
    assert kept(child).kill_in_seconds <= 0


def test_signal_without_a_cause_is_no_end_that_was_asked_for(start_child: StartChild) -> None:
    child = start_child()
    keep_end_request(child, None, signal.SIGHUP)
    assert child.asked is None


def test_nothing_is_kept_for_a_job_that_has_ended(start_child: StartChild) -> None:
    child = start_child()
    child.exit = ChildExit(0, None)
    keep_end_request(child, EndRequest("stop", 0), signal.SIGTERM)
    assert child.asked is None


def test_job_that_has_ended_gets_no_signal(start_child: StartChild) -> None:
    """Its process still lives here: only what the launcher knows may decide."""
    child = start_child()
    child.exit = ChildExit(0, None)
    with pytest.raises(ProcessLookupError):
        deliver(child, signal.SIGKILL)
    child.exit = None
    assert os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def test_signal_to_a_job_without_a_process_has_no_effect(start_child: StartChild) -> None:
    child = start_child()
    own, child.pidfd = child.pidfd, -1
    assert not deliver(child, signal.SIGKILL)
    child.pidfd = own


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_signal_that_no_process_can_heed_is_always_sent(
    start_child: StartChild, number: signal.Signals
) -> None:
    child = start_child()
    assert deliver(child, number)
    found = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    assert found is not None
    assert found.si_status == number


@pytest.mark.parametrize("way", ["--block-signal=USR2", "--ignore-signal=USR2"])
def test_signal_that_is_blocked_or_ignored_is_sent(start_child: StartChild, way: str) -> None:
    child = start_child("env", way, "sh", "-c", "echo; read x", says=True)
    assert deliver(child, signal.SIGUSR2)
    assert not deliver(child, signal.SIGUSR1), "it is neither"


def test_signal_that_is_caught_is_sent(start_child: StartChild) -> None:
    child = start_child("sh", "-c", "trap 'exit 7' USR2; echo; read x", says=True)
    assert deliver(child, signal.SIGUSR2)
    assert end_of(child).si_status == 7


def test_init_passes_on_a_signal_that_its_masks_do_not_show(start_child: StartChild) -> None:
    child = start_child()
    assert not deliver(child, signal.SIGUSR2)
    child.report = 0
    assert deliver(child, signal.SIGUSR2)
    assert end_of(child).si_status == signal.SIGUSR2


NAMED = r"printf '\377\nSigCgt: f' >/proc/$$/comm; trap '' USR1; echo; read x"


def test_signal_reaches_a_process_whose_name_is_no_text(start_child: StartChild) -> None:
    child = start_child("sh", "-c", NAMED, says=True)
    assert Path(f"/proc/{child.pid}/comm").read_bytes() == b"\xff\nSigCgt: f\n"
    assert deliver(child, signal.SIGUSR1)
    assert not deliver(child, signal.SIGTERM)


def test_signal_is_sent_where_nothing_tells_whether_it_is_heeded(start_child: StartChild) -> None:
    child = start_child()
    assert not deliver(child, signal.SIGTERM)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert deliver(child, signal.SIGTERM)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert end_of(child).si_status == signal.SIGTERM
