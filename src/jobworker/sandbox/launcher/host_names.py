"""Sets the host names that jobs see, in a process of its own: uts_namespaces(7).

The kernel has one lock for the names in all UTS namespaces of the host. uname(2) takes it too, and
a process that has it may lose its processor before it gives it back. Beside a job of 300 processes
that do nothing but uname(2), sethostname(2) waited for 24 ms in the median and 513 ms at most,
on Linux 6.18 with two processors. So the launcher asks a process and does not wait. The fork server
does not do this, since it would make and remove nothing meanwhile.

An answer takes a tenth of a start's time, so each spare has the name that a next start is likely to
ask for: the number in it is one higher than in the name before. A start that asks for another name
waits for the process.

Standard library only.
"""

import os
import socket
from collections.abc import Callable, Sequence

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.channel import Message, close_all
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.fork_server import Answer
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.protocol.requests import MAX_HOSTNAME_BYTES

NAME = "host-names"
"""The name that ps(1) shows for the process."""


class HostNames:
    """The process that sets host names, and the calls to it. Raises OSError."""

    def __init__(self, event_loop: EventLoop) -> None:
        self._process = ForkServer(event_loop, {"name": _name_host}, name=NAME)
        self.next = ""
        """The name for the next spare; "" while no name is likely."""

    def set(self, pidfd: int, name: str, done: Callable[[Message], None]) -> None:
        """Set the host name that a process sees; `done` gets the outcome in a later turn.

        The outcome is empty, or {"errno": ..., "detail": ...}. Raises OSError.
        """
        own = os.dup(pidfd)  # the process may be cleared away, and its number be another's

        def on_answer(answer: Message, _: list[int]) -> None:
            close_all([own])
            done(answer)

        try:
            self._process.call("name", (name,), on_answer, [own])
        except BaseException:
            os.close(own)
            raise

    def name_ahead(self, child: Child) -> None:
        """Set the next name for a spare, which then has it as its `host_name`. Raises OSError."""
        name = self.next
        if not name:
            return
        self.next = following(name)

        def done(outcome: Message) -> None:
            if "errno" not in outcome:
                child.host_name = name

        self.set(child.pidfd, name, done)

    def close(self) -> None:
        """Kill the process and wait for its end. For tests: else it ends with the launcher."""
        self._process.close()


def following(name: str) -> str:
    """The name with the number at its end one higher; "" without a number, or if too long."""
    head = name.rstrip("0123456789")
    number = name[len(head) :]
    next_name = f"{head}{int(number) + 1}" if number else ""
    return next_name if len(next_name.encode()) <= MAX_HOSTNAME_BYTES else ""


def _name_host(name: str, passed: Sequence[int]) -> Answer:
    """Set the name, and return to the own UTS namespace even if that fails. Raises OSError.

    The job has no right to set it.
    """
    (process,) = passed
    own = os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sc.setns(process, sc.CLONE_NEWUTS)
        try:
            socket.sethostname(name)
        finally:
            sc.setns(own, sc.CLONE_NEWUTS)
    finally:
        os.close(own)
    return {}, []
