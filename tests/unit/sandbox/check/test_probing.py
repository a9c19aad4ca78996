"""A probe cannot hang, break or outlive the program that runs it, and never passes by mistake."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from jobworker.errors import HostUnsupported
from jobworker.sandbox.check import probing
from jobworker.sandbox.check.probing import Finding, Missing, Probe, try_one
from jobworker.sandbox.host_restrictions import ALLOW, user_namespace_remedy


def tried(work: probing.Work) -> Finding:
    return try_one(Probe("group", "name", work, "the usual remedy"))


def test_mechanism_of_what_works() -> None:
    assert tried(lambda: "by magic") == Finding("group", "name", True, True, "by magic", "")


def test_reason_and_remedy_of_what_is_missing() -> None:
    def refuse() -> str:
        raise Missing("not today", "come again")

    assert tried(refuse)[2:] == (False, True, "not today", "come again")


def test_kernel_reason_and_the_usual_remedy() -> None:
    def fail() -> str:
        os.rmdir("/proc")
        return ""

    found = tried(fail)
    assert not found.supported
    assert found.detail == "Device or resource busy (/proc) [EBUSY]"
    assert found.remedy == "the usual remedy"


def test_missing_system_call_is_told_in_words() -> None:
    def fail() -> str:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    assert "does not have the system call" in tried(fail).detail


def test_error_of_ours_keeps_its_remedy() -> None:
    def fail() -> str:
        raise HostUnsupported("cannot X: no Y", remedy="get Y")

    assert tried(fail)[4:] == ("cannot X: no Y", "get Y")


def test_fault_in_a_probe_is_no_support() -> None:
    found = tried(lambda: str(1 // 0))
    assert not found.supported
    assert (
        found.detail
        == "the probe is at fault: ZeroDivisionError: integer division or modulo by zero"
    )


def test_killed_probe_is_no_support() -> None:
    def die() -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    assert tried(die).detail == "the process that tried it ended (signal 9)"


def test_silent_exit_is_no_support() -> None:
    assert "exit code 0" in tried(lambda: os._exit(0)).detail


def test_hanging_probe_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "SECONDS", 0.1)

    def hang() -> str:
        while True:
            signal.pause()

    assert "no answer within" in tried(hang).detail


def test_long_reasons_do_not_break_the_pipe() -> None:
    def fail() -> str:
        raise Missing("é" * 100_000)

    assert set(tried(fail).detail) == {"é"}


def test_descendants_end_with_the_probe() -> None:
    """A grandchild that outlives its parent is adopted and ended, though it holds the pipe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # the adopting process must not be pytest
        try:
            probing.adopt_descendants()

            def leave_one() -> str:
                grandchild = os.fork()
                if grandchild == 0:
                    os.setsid()
                    while True:
                        time.sleep(60)
                return str(grandchild)

            told = tried(leave_one).detail
            probing.end_descendants()
            os.write(write, told.encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    grandchild = int(os.read(read, 100))
    assert not Path(f"/proc/{grandchild}").exists()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("switches", "root", "word"),
    [
        ({"user/max_user_namespaces": "0"}, True, "user.max_user_namespaces"),
        ({"user/max_user_namespaces": "0"}, False, "user.max_user_namespaces"),
        ({"kernel/unprivileged_userns_clone": "0"}, False, "kernel.unprivileged_userns_clone=1"),
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, False, "AppArmor profile"),
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, True, ALLOW),
        ({"kernel/unprivileged_userns_clone": "1"}, False, ALLOW),
        ({}, False, ALLOW),
    ],
)
def test_switch_that_forbids_user_namespaces_is_named(
    tmp_path: Path, switches: dict[str, str], root: bool, word: str
) -> None:
    for name, value in switches.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert word in user_namespace_remedy(str(tmp_path), root=root)
