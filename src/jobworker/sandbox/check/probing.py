"""Try something for real in a throw-away process, and tell what came of it.

A probe is a function that does what a job's start will do and answers by which mechanism it
worked; what it raises is why it does not. It runs in a process of its own that is killed
afterwards, with all that it started, so it may unshare, mount, drop and limit as it likes.

What must hold: no probe can hang or end the program that runs it, whatever the kernel answers;
a fault in a probe is told as such and never passes for "supported".

Standard library only.
"""

import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from jobworker.errors import JobworkerError
from jobworker.sandbox import syscalls as sc

SECONDS = 10.0
"""Longest time for one probe; an OOM kill on a busy machine takes a second."""
_TEXT = 600
_PR_SET_CHILD_SUBREAPER = 36


class Missing(Exception):
    """What is not there: the reason, and what to do about it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


Work = Callable[[], str]
"""Tries something and answers by which mechanism it worked, or raises why it did not."""


class Probe(NamedTuple):
    """Something to try."""

    group: str
    name: str
    work: Work
    remedy: str
    """What to do where it is missing and nothing more precise is known."""
    needed: bool = True
    """Whether jobs cannot run without it."""


class Finding(NamedTuple):
    """What came of a probe."""

    group: str
    name: str
    supported: bool
    needed: bool
    detail: str
    """The mechanism, or the reason in the kernel's words."""
    remedy: str


def try_one(probe: Probe) -> Finding:
    """Try a probe in a process of its own."""
    group, name, work, remedy, needed = probe
    try:
        return Finding(group, name, True, needed, apart(work), "")
    except Missing as missing:
        return Finding(group, name, False, needed, missing.reason, missing.remedy or remedy)


def adopt_descendants() -> None:
    """Become the parent of all that probes leave: prctl(2), PR_SET_CHILD_SUBREAPER.

    For a process that has no other children; see `end_descendants`.
    """
    sc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def apart(work: Work, flags: int = 0, cgroup: int | None = None) -> str:
    """Run `work` in a child, cloned with namespace `flags` and into `cgroup`, and wait for it.

    Raises Missing with its reason, and OSError where there is no child to be had.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = _child(flags, cgroup)
        if pid == 0:
            _work_and_exit(work, write)
    finally:
        os.close(write)
    try:
        said = _listen(read, time.monotonic() + SECONDS)
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)  # not reaped yet: the number is still its own
        _, status = os.waitpid(pid, 0)
    if said is None:
        raise Missing(f"no answer within {SECONDS:.0f} s")
    if not said:
        raise Missing(f"the process that tried it ended ({_end(status)})")
    told = json.loads(said)
    if "works" in told:
        return str(told["works"])
    raise Missing(str(told["reason"]), str(told["remedy"]))


def _child(flags: int, cgroup: int | None) -> int:
    if not flags and cgroup is None:
        return os.fork()  # what must work where clone3(2) does not
    pid, pidfd = sc.clone3(flags, cgroup)
    if pid:
        os.close(pidfd)
    return pid


def _work_and_exit(work: Work, tell: int) -> NoReturn:
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        told = {"works": work()}
    except Missing as missing:
        told = {"reason": missing.reason, "remedy": missing.remedy}
    except JobworkerError as error:
        told = {"reason": error.message, "remedy": error.remedy}
    except OSError as error:
        told = {"reason": reason_of(error), "remedy": ""}
    except BaseException as fault:  # noqa: BLE001 - this process must not return
        told = {"reason": f"the probe is at fault: {type(fault).__name__}: {fault}", "remedy": ""}
    try:
        short = {key: text[:_TEXT] for key, text in told.items()}
        os.write(tell, json.dumps(short).encode())  # at once, being shorter than PIPE_BUF
    finally:
        os._exit(0)


def _listen(read: int, until: float) -> bytes | None:
    """All that the child says until it ends; None if it does not end in time."""
    said = b""
    while True:
        patience = max(0.0, until - time.monotonic())
        if not select.select([read], [], [], patience)[0]:
            return None
        piece = os.read(read, 65_536)
        if not piece:
            return said
        said += piece
        if said.endswith(b"}"):  # one line of JSON: a grandchild may hold the pipe still
            return said


def reason_of(error: OSError) -> str:
    """The kernel's reason, and what it was about where that is known."""
    if error.errno == errno.ENOSYS:
        return "this kernel, or a filter around us, does not have the system call"
    reason = error.strerror or str(error)
    name = errno.errorcode.get(error.errno or 0, "")
    about = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return f"{reason}{about}" + (f" [{name}]" if name else "")


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def end_descendants() -> None:
    """Kill and reap whatever still runs below this process."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as listed:
                children = [int(pid) for pid in listed.read().split()]
        except OSError:
            return
        if not children:
            return
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
