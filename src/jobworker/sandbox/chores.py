"""Chores: work on file systems that may take long, each done by a process of its own.

The launcher's one thread must not wait for a disk: unlink(2) of a volume with many extents takes
seconds, and even a look into a directory waits for the journal of a file system that jobs write
to. So such work is a function that runs in a cloned process and returns a message; the launcher
goes on meanwhile, and hears of the outcome in a later turn.

Few run at a time and some wait. More are refused with `CROWDED`.

Standard library only.
"""

import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from jobworker.sandbox import channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disposal import close_all_but
from jobworker.sandbox.turns import Turns

CROWDED = errno.EUSERS
"""Too much waits: an errno that the kernel has for nothing that a chore does."""
LOOK_AGAIN_SECONDS = 0.1
"""A process that nothing can watch, or that cannot be collected yet, is looked at so often."""

Work = Callable[[], channel.Message]
"""Runs in the process; may raise OSError."""
Done = Callable[[channel.Message], None]
"""Gets what the work returned, or {"errno": …} with "detail" where it failed."""


class Chores:
    """Processes at work, and chores that wait for their turn."""

    def __init__(self, turns: Turns, *, at_once: int, waiting: int) -> None:
        self._turns, self._at_once, self._room = turns, at_once, waiting
        self._waiting: deque[tuple[Work, Done, Sequence[int]]] = deque()
        self._running = 0

    def start(self, work: Work, done: Done, holding: Sequence[int] = ()) -> None:
        """Have the work done, now or later. Raises OSError, `CROWDED` where too much waits.

        The process holds the descriptors in `holding`, which stay open here until it is done.
        """
        if self._running < self._at_once:
            self._run(work, done, holding)
        elif len(self._waiting) < self._room:
            self._waiting.append((work, done, holding))
        else:
            raise OSError(CROWDED, "too much waits")

    def _run(self, work: Work, done: Done, holding: Sequence[int]) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            try:
                pid, pidfd = sc.clone3(0)
            except OSError:
                near.close()
                raise
            if pid == 0:
                _work_and_exit(work, far, holding)
        near.setblocking(False)
        on_exit = partial(self._on_exit, near, pidfd, done)
        try:
            # The process has said its word before it ends, and its end is soon after.
            self._turns.watch(pidfd, on_exit)
        except OSError:  # of epoll: no memory, or no more watches to be had
            self._turns.call_in(LOOK_AGAIN_SECONDS, on_exit)
        self._running += 1

    def _on_exit(self, near: socket.socket, pidfd: int, done: Done) -> None:
        """Take the outcome of a process that has ended; else look again later."""
        self._turns.unwatch(pidfd)
        if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
            on_exit = partial(self._on_exit, near, pidfd, done)
            self._turns.call_in(LOOK_AGAIN_SECONDS, on_exit)
            return
        os.close(pidfd)
        self._running -= 1
        outcome: channel.Message = {"errno": errno.EINTR, "detail": "the process ended"}
        with near:
            try:
                received = channel.receive(near)
                outcome = outcome if received is None else received[0]
            except channel.DescriptorsLost as error:  # of a long outcome, which travels in one
                channel.close_all(error.descriptors)
                outcome = {"errno": errno.EMFILE, "detail": "its outcome finds no descriptor"}
            except channel.BadMessage as error:
                channel.close_all(error.descriptors)
            except OSError:
                pass  # it was killed before it could tell
        self._turns.see_through(self._start_next)
        self._hand_over(done, outcome)

    def _start_next(self) -> None:
        while self._waiting and self._running < self._at_once:
            work, done, holding = self._waiting.popleft()
            try:
                self._run(work, done, holding)
            except OSError as error:  # no process to be had
                self._hand_over(done, _failure(error))

    def _hand_over(self, done: Done, outcome: channel.Message) -> None:
        """Tell an outcome; one that meets an unexpected fault is told as a failure.

        Whoever asked would wait for ever.
        """
        try:
            done(outcome)
        except Exception:  # noqa: BLE001 - recorded
            incident = self._turns.record("the outcome of a chore")
            done({"errno": errno.EPROTO, "detail": f"an unexpected fault, incident {incident}"})


def _work_and_exit(work: Work, far: socket.socket, holding: Sequence[int]) -> NoReturn:
    """In the process: no more of the launcher's is held, so that no end of a job is delayed."""
    try:
        close_all_but([far.fileno(), *holding])
        try:
            outcome = work()
        except OSError as error:
            outcome = _failure(error)
        channel.send(far, outcome)
    finally:
        os._exit(0)


def _failure(error: OSError) -> channel.Message:
    return {"errno": error.errno or errno.EIO, "detail": str(error.filename or "")}
