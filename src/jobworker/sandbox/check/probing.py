"""Runs a probe in a throw-away process and returns its finding.

A probe is a function that does one thing that the start of a job does. It returns the mechanism by
which this worked, or raises the reason why it did not. It runs in a process of its own, which is
killed afterwards with all processes that it started. So it may unshare, mount, drop and limit
anything.

What must hold: a probe can neither hang nor end the program that runs it. A programming error in a
probe is reported as such, never as "supported".

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
"""The longest time for one probe. An OOM kill on a busy machine takes about a second."""
_TEXT = 600
_PR_SET_CHILD_SUBREAPER = 36


class Missing(Exception):
    """A probe has failed: the reason, and what to do about it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


Work = Callable[[], str]
"""Returns the mechanism by which it worked. Raises Missing, JobworkerError or OSError if not."""


class Probe(NamedTuple):
    """One thing to try."""

    group: str
    """The heading below which its finding is printed."""
    name: str
    work: Work
    remedy: str
    """What to do if it fails and `Missing` brings no remedy of its own."""
    needed: bool = True
    """Whether jobs cannot run without it."""


class Finding(NamedTuple):
    """The result of a probe."""

    group: str
    name: str
    supported: bool
    needed: bool
    detail: str
    """The mechanism if it is supported, else the reason."""
    remedy: str


def try_one(probe: Probe) -> Finding:
    """Run a probe in a process of its own and return its finding."""
    group, name, work, remedy, needed = probe
    try:
        return Finding(group, name, True, needed, run_in_child(work), "")
    except Missing as missing:
        return Finding(group, name, False, needed, missing.reason, missing.remedy or remedy)


def adopt_descendants() -> None:
    """Make this process the parent of orphans that probes leave: PR_SET_CHILD_SUBREAPER, prctl(2).

    Only for a process without other children, since `end_descendants` kills all of them.
    """
    sc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def run_in_child(work: Work, flags: int = 0, cgroup: int | None = None) -> str:
    """Run `work` in a child, and return its result.

    The child is cloned with the namespace `flags`, into the control group of the descriptor
    `cgroup` if there is one. Raises Missing with the reason if `work` fails or takes longer than
    `SECONDS`, and OSError if no child can be made.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = _child(flags, cgroup)
        if pid == 0:
            _work_and_exit(work, write)
    finally:
        os.close(write)
    try:
        answer = _read_answer(read, time.monotonic() + SECONDS)
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)  # it is not reaped yet, so its process id is not reused
        _, status = os.waitpid(pid, 0)
    if answer is None:
        raise Missing(f"no answer within {SECONDS:.0f} s")
    if not answer:
        raise Missing(f"the process that tried it ended ({_end(status)})")
    message = json.loads(answer)
    if "works" in message:
        return str(message["works"])
    raise Missing(str(message["reason"]), str(message["remedy"]))


def _child(flags: int, cgroup: int | None) -> int:
    if not flags and cgroup is None:
        return os.fork()  # so that probes also run on a host without clone3(2)
    pid, pidfd = sc.clone3(flags, cgroup)
    if pid:
        os.close(pidfd)
    return pid


def _work_and_exit(work: Work, answer: int) -> NoReturn:
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        message = {"works": work()}
    except Missing as missing:
        message = {"reason": missing.reason, "remedy": missing.remedy}
    except JobworkerError as error:
        message = {"reason": error.message, "remedy": error.remedy}
    except OSError as error:
        message = {"reason": reason_of(error), "remedy": ""}
    except BaseException as fault:  # noqa: BLE001 - this process must not return
        reason = f"the probe is at fault: {type(fault).__name__}: {fault}"
        message = {"reason": reason, "remedy": ""}
    try:
        short = {key: text[:_TEXT] for key, text in message.items()}
        os.write(answer, json.dumps(short).encode())  # in one piece: it is shorter than PIPE_BUF
    finally:
        os._exit(0)


def _read_answer(read: int, until: float) -> bytes | None:
    """The child's answer, b"" if it ends without one, None if there is none until `until`."""
    answer = b""
    while True:
        remaining = max(0.0, until - time.monotonic())
        if not select.select([read], [], [], remaining)[0]:
            return None
        piece = os.read(read, 65_536)
        if not piece:
            return answer
        answer += piece
        if answer.endswith(b"}"):  # complete; a grandchild may still hold the pipe open
            return answer


def reason_of(error: OSError) -> str:
    """The kernel's message with the errno's name, and the file if there is one."""
    if error.errno == errno.ENOSYS:
        return "this kernel does not have the system call, or a filter around the service denies it"
    reason = error.strerror or str(error)
    name = errno.errorcode.get(error.errno or 0, "")
    about = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    return f"{reason}{about}" + (f" [{name}]" if name else "")


def _end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def end_descendants() -> None:
    """Kill and reap all descendants of this process, for at most `SECONDS`."""
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
