"""The fork server: a process that makes processes and control groups in the launcher's place.

clone3(2), and whatever makes, removes or fills a control group, wait for the kernel's locks on
groups, which it has once for the whole host. Others hold them for as long as they like: 3.4 s were
measured beside a job of 10,000 processes. The launcher's one thread must not wait, so it asks this
process, and goes on (`sandbox.forks` is its side).

It is a fork of the launcher with root's rights, so it has all code and all that was prepared at the
start. Processes are cloned with CLONE_PARENT: the launcher is their parent, and gets their pidfds.
It does one thing after the other.

What must hold: the fork server may be killed at any moment, and then everything of which the
launcher has no answer is done anew. So a process that it makes does nothing that counts until the
launcher has heard of it and lets it: a chore waits for `GO` (`run`), and a child for its order.

Calls and arguments are pickled: both ends are this program, with the same rights, and nobody else
has a descriptor of the socket.

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
from jobworker.sandbox import channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.channel import Message, close_all
from jobworker.sandbox.log import say_fault

MAX_PASSED = 250
"""Descriptors that one call may bring along: the kernel takes 253, unix(7)."""
GO = b"go"
NAME = "fork-server"
"""What ps(1) shows of it, and of what it has made until that executes a program."""

Answer = tuple[Message, list[int]]
"""A message, and up to `channel.MAX_DESCRIPTORS` descriptors, which are closed once they are
sent."""
Function = Callable[..., Answer]
"""Something that the launcher asks for; may raise OSError or JobworkerError. It gets the arguments
of the call, and at last the descriptors that came along, if any, which are closed afterwards."""
Work = Callable[[], Message]
"""What a chore does, to be pickled; may raise OSError."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_PASSED * array.array("i").itemsize)
_PASSED_OVER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def pack_call(name: str, arguments: Sequence[object]) -> bytes:
    """The body of a call."""
    return pickle.dumps((name, arguments), pickle.HIGHEST_PROTOCOL)


def start(
    functions: Mapping[str, Function], kept: Sequence[int], sock: socket.socket
) -> tuple[int, int]:
    """Clone the fork server, which serves `sock`: (pid, pidfd). Raises OSError.

    It has the descriptors in `kept`, and no others of the launcher's.
    """
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        _serve(sock, {**functions, "run": _run}, kept)
    return pid, pidfd


def failure(error: OSError | JobworkerError) -> Message:
    """The answer that tells of an error."""
    if isinstance(error, OSError):
        return {"errno": error.errno or errno.EIO, "detail": str(error.filename or "")}
    code = error.data.get("errno", 0)
    told = {"step": error.data["step"]} if "step" in error.data else {}
    return {**told, "errno": code, "detail": str(error.data.get("detail", error.message))}


def close_all_but(kept: Sequence[int]) -> None:
    """Close what belongs to others: it would be kept open."""
    first = 3
    for descriptor in sorted(kept):
        if descriptor > first:
            sc.close_range(first, descriptor - 1)
        first = max(first, descriptor + 1)
    sc.close_range(first)


def _serve(sock: socket.socket, functions: Mapping[str, Function], kept: Sequence[int]) -> NoReturn:
    try:
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:
            name.write(NAME)
        signal.set_wakeup_fd(-1)
        for number in _PASSED_OVER:  # the launcher tells when to end; execve(2) undoes this
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
    except BaseException:  # noqa: BLE001 - recorded: nothing of the launcher's may run on here
        say_fault("the fork server has ended")
    finally:
        os._exit(0)


def _answer(
    functions: Mapping[str, Function], packet: bytes, ancillary: channel.Ancillary, flags: int
) -> Answer:
    try:
        body, passed = channel.unpack(packet, ancillary, flags)
    except channel.BadMessage as error:  # no room for what came with it
        close_all(error.descriptors)
        return {"errno": errno.EMFILE, "detail": "the fork server has no room"}, []
    try:
        name, arguments = pickle.loads(body)  # noqa: S301 - the launcher's own
        return functions[name](*arguments, *((passed,) if passed else ()))
    except (OSError, JobworkerError) as error:
        return failure(error), []
    except Exception:  # noqa: BLE001 - recorded; whoever asked would wait for ever
        incident = os.urandom(4).hex()
        say_fault(f"incident {incident}: the fork server")
        return {"errno": errno.EPROTO, "detail": f"an unexpected fault, incident {incident}"}, []
    finally:
        close_all(passed)


def _run(work: Work, numbers: Sequence[int], passed: Sequence[int]) -> Answer:
    """Clone a process for a chore, which has `passed` at `numbers`, as the launcher has them.

    The first one is its socket to the launcher. The process begins once it hears `GO` there, and
    ends at the end of the stream. When the launcher is told of it, nobody but the launcher and the
    process has those descriptors.
    """
    pid, pidfd = sc.clone3(sc.CLONE_PARENT)
    if pid == 0:
        _work_and_exit(work, numbers, passed)
    return {"pid": pid}, [pidfd]


def _work_and_exit(work: Work, numbers: Sequence[int], passed: Sequence[int]) -> NoReturn:
    """In the process: no more of the launcher's is held, so that no end of a job is delayed."""
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


def _put_in_place(passed: Sequence[int], numbers: Sequence[int]) -> None:
    """Have `passed` at `numbers`, whichever of these overlap; the kernel gives the lowest first."""
    taken, away = set(numbers), []
    for descriptor in passed:
        copy = os.dup(descriptor)
        while copy in taken:
            copy = os.dup(descriptor)
        away.append(copy)
    for copy, number in zip(away, numbers, strict=True):
        os.dup2(copy, number, inheritable=False)
