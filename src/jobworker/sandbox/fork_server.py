"""The fork server: a process that makes processes and control groups in the launcher's place.

The kernel has one set of locks on control groups for the whole host. clone3(2) waits for these
locks, and so does every call that makes or removes a group or moves a process into one. There is no
bound on how long other processes hold them: 3.4 s were measured beside a job of 10,000 processes.
The launcher's one thread must not wait, so it sends such calls to this process and goes on
(`sandbox.forks` is its side).

The fork server is a fork of the launcher with root's rights, so it has the same code and all that
was prepared at the start. It clones processes with CLONE_PARENT: the launcher is their parent, and
gets their pidfds. It handles one call after the other.

What must hold: the fork server may be killed at any moment. The launcher then repeats every call
that was not answered. So a process that the fork server makes has no effect until the launcher has
the answer and releases the process: a chore waits for `GO` (`run`), and a child for its order.

Calls and arguments are pickled. That is safe here, because both ends are this program with the same
rights, and no other process has a descriptor of the socket.

Standard library only.
"""

import array
import contextlib
import errno
import os
import pickle
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from jobworker.errors import JobworkerError
from jobworker.sandbox import channel, reaper
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.channel import Message, close_all
from jobworker.sandbox.log import log_exception

MAX_PASSED = 250
"""The bound on the descriptors of one call. The kernel takes at most 253 in a message: unix(7)."""
GO = b"go"
NAME = "fork-server"
"""The name that ps(1) shows for it, and for each process that it made until that process executes
a program."""

Answer = tuple[Message, list[int]]
"""A message and up to `channel.MAX_DESCRIPTORS` descriptors. The fork server closes them once they
are sent."""
Function = Callable[..., Answer]
"""A function that the launcher can call. It gets the arguments of the call and then, if the call
has descriptors, a list of them, which the fork server closes afterwards. May raise OSError or
JobworkerError."""
Work = Callable[[], Message]
"""The function of a chore. It has to be picklable, and may raise OSError."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_PASSED * array.array("i").itemsize)
_PASSED_OVER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def pack_call(name: str, arguments: Sequence[object]) -> bytes:
    """The body of a message that calls the function `name` with `arguments`."""
    return pickle.dumps((name, arguments), pickle.HIGHEST_PROTOCOL)


def start(
    name: str, functions: Mapping[str, Function], kept: Sequence[int], sock: socket.socket
) -> tuple[int, int]:
    """Clone the fork server, which answers calls on `sock`. Returns its pid and pidfd.

    `name` is what ps(1) shows. It keeps `sock` and the descriptors in `kept`, and closes all others
    of the launcher. Raises OSError, and BlockingIOError while the launcher has a second thread.
    """
    if reaper.is_running():
        raise BlockingIOError(errno.EAGAIN, "the launcher's reaper is busy")
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        _serve(name, sock, {**functions, "run": _run}, kept)
    return pid, pidfd


def failure(error: OSError | JobworkerError) -> Message:
    """The answer to a call that has failed with this error: an errno, a detail, maybe a step."""
    if isinstance(error, OSError):
        return {"errno": error.errno or errno.EIO, "detail": str(error.filename or "")}
    code = error.data.get("errno", 0)
    told = {"step": error.data["step"]} if "step" in error.data else {}
    return {**told, "errno": code, "detail": str(error.data.get("detail", error.message))}


def close_all_but(kept: Sequence[int]) -> None:
    """Close all descriptors from 3 on except for `kept`.

    Otherwise this process would keep open what the launcher has closed.
    """
    first = 3
    for descriptor in sorted(kept):
        if descriptor > first:
            sc.close_range(first, descriptor - 1)
        first = max(first, descriptor + 1)
    sc.close_range(first)


def _serve(
    name: str, sock: socket.socket, functions: Mapping[str, Function], kept: Sequence[int]
) -> NoReturn:
    try:
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
            comm.write(name)
        signal.set_wakeup_fd(-1)
        for number in _PASSED_OVER:  # it ends when the launcher does; execve(2) undoes this
            signal.signal(number, lambda *_: None)
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        close_all_but([sock.fileno(), *kept])
        sock.setblocking(True)
        while True:
            packet, ancillary, flags, _ = sock.recvmsg(
                channel.PACKET_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
            if not packet and not ancillary:
                break
            answer, descriptors = _answer(functions, packet, ancillary, flags)
            channel.send(sock, answer, descriptors)
            close_all(descriptors)
    except BaseException:  # noqa: BLE001 - recorded; no code of the launcher may go on in here
        log_exception(f"the {name} has ended")
    finally:
        os._exit(0)


def _answer(
    functions: Mapping[str, Function], packet: bytes, ancillary: channel.Ancillary, flags: int
) -> Answer:
    try:
        body, passed = channel.unpack(packet, ancillary, flags)
    except channel.BadMessage as error:  # this process can open no more descriptors
        close_all(error.descriptors)
        return {"errno": errno.EMFILE, "detail": "the fork server is out of descriptors"}, []
    try:
        name, arguments = pickle.loads(body)  # noqa: S301 - the launcher's own
        return functions[name](*arguments, *((passed,) if passed else ()))
    except (OSError, JobworkerError) as error:
        return failure(error), []
    except Exception:  # noqa: BLE001 - recorded; without an answer the launcher waits for ever
        incident = os.urandom(4).hex()
        log_exception(f"incident {incident}: the fork server")
        return {"errno": errno.EPROTO, "detail": f"an unexpected fault, incident {incident}"}, []
    finally:
        close_all(passed)


def _run(work: Work, numbers: Sequence[int], passed: Sequence[int]) -> Answer:
    """Clone a process for a chore.

    The process has the descriptors `passed` at the numbers `numbers`, which the launcher has for
    them too. The first one is its socket to the launcher. The process waits for `GO` there, and
    ends without any work if the stream ends instead. When the launcher has the answer, only the
    launcher and the process hold these descriptors.
    """
    pid, pidfd = sc.clone3(sc.CLONE_PARENT)
    if pid == 0:
        _work_and_exit(work, numbers, passed)
    return {"pid": pid}, [pidfd]


def _work_and_exit(work: Work, numbers: Sequence[int], passed: Sequence[int]) -> NoReturn:
    """Do a chore's work in its own process, send the outcome and exit.

    The process first closes all descriptors except `numbers`: one that it kept open could delay the
    end of a job.
    """
    try:
        _put_in_place(passed, numbers)
        close_all_but(numbers)
        with socket.socket(fileno=numbers[0]) as sock:
            if sock.recv(len(GO)) == GO:
                channel.send(sock, _outcome_of(work))
    finally:
        os._exit(0)


def _outcome_of(work: Work) -> Message:
    try:
        return work()
    except OSError as error:
        return failure(error)
    except Exception:  # noqa: BLE001 - recorded; the process ends with it
        incident = os.urandom(4).hex()
        log_exception(f"incident {incident}: a chore")
        return {"errno": errno.EPROTO, "detail": f"an unexpected fault, incident {incident}"}


def _put_in_place(passed: Sequence[int], numbers: Sequence[int]) -> None:
    """Duplicate `passed` to `numbers`, even if the two overlap.

    dup(2) returns the lowest free number, which may be one of `numbers`. So each descriptor is
    first duplicated to a number outside of `numbers`.
    """
    taken, away = set(numbers), []
    for descriptor in passed:
        copy = os.dup(descriptor)
        while copy in taken:
            copy = os.dup(descriptor)
        away.append(copy)
    for copy, number in zip(away, numbers, strict=True):
        os.dup2(copy, number, inheritable=False)
