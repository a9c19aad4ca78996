"""Chores: work on file systems that may take long, each done by a process of its own.

The launcher's one thread must not wait for a disk: unlink(2) of a volume with many extents takes
seconds, and even a look into a directory waits for the journal of a file system that jobs write
to. So such work is a function that runs in a cloned process and returns a message; the launcher
goes on meanwhile, and hears of the outcome in a later turn.

Few run at a time and some wait. More are refused with `CROWDED`.

What looks at processes of jobs may have to wait for what a job holds, even where no signal ends a
process. Such chores have an end, which is kept here: in their own process nothing runs then. One
that cannot be ended gives its place to another and is told as a failure with `UNENDING`; where too
many are left so, none is started any more, with `CROWDED`. The time is counted in looks: a launcher
that was stopped itself ends nothing.

Standard library only.
"""

import contextlib
import errno
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from jobworker.sandbox import channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disposal import close_all_but
from jobworker.sandbox.event_loop import Turns

CROWDED = errno.EUSERS
"""Too much waits: an errno that the kernel has for nothing that a chore does."""
LOOK_AGAIN_SECONDS = 0.1
"""A process that nothing can watch, or that cannot be collected yet, is looked at so often."""
UNENDING = errno.ETIMEDOUT
"""It was killed, and has not ended."""
MOST_WAITING_SECONDS = 3.0
"""For anything but a processor; those that look at jobs use processors, mostly."""
MOST_SECONDS = 60.0
"""In all, so on a busy machine also for a processor."""
LOOK_SECONDS = 1.0

Work = Callable[[], channel.Message]
"""Runs in the process; may raise OSError."""
Done = Callable[[channel.Message], None]
"""Gets what the work returned, or {"errno": …} with "detail" where it failed."""


class _UnderWay:
    """A process that has an end."""

    def __init__(self, pid: int, give_up: Callable[[], None]) -> None:
        self._pid, self.give_up, self.is_killed = pid, give_up, False
        self._looks, self._busy_before = 0, _busy_seconds(pid)

    def is_overdue(self) -> bool:
        """Whether its time is over; to be asked once in `LOOK_SECONDS`."""
        self._looks += 1
        seconds = self._looks * LOOK_SECONDS
        busy = _busy_seconds(self._pid) - self._busy_before
        return seconds - busy > MOST_WAITING_SECONDS or seconds > MOST_SECONDS

    def kill(self, pidfd: int) -> None:
        """End it; it has as long for that."""
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self.is_killed, self._looks, self._busy_before = True, 0, _busy_seconds(self._pid)


class Chores:
    """Processes at work, and chores that wait for their turn.

    `unending`: up to so many may be left that cannot be ended; where it is 0, they have no end.
    """

    def __init__(self, turns: Turns, *, at_once: int, waiting: int, unending: int = 0) -> None:
        self._turns, self._at_once, self._room = turns, at_once, waiting
        self._most_unending = unending
        self._under_way: dict[int, _UnderWay] = {}
        """By pidfd, where they have an end."""
        self._unending: set[int] = set()
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
        if len(self._unending) >= self._most_unending > 0:
            raise OSError(CROWDED, "too many processes are left that cannot be ended")
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
        if self._most_unending:
            give_up = partial(self._give_up, near, pidfd, done)
            self._under_way[pidfd] = _UnderWay(pid, give_up)
            if not self._turns.is_set(self._look):
                self._turns.call_in(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """End what is overdue, and give up what has not ended for that."""
        if self._under_way:
            self._turns.call_in(LOOK_SECONDS, self._look)
        for pidfd, process in list(self._under_way.items()):
            if process.is_overdue():
                if process.is_killed:
                    process.give_up()
                else:
                    process.kill(pidfd)

    def _give_up(self, near: socket.socket, pidfd: int, done: Done) -> None:
        del self._under_way[pidfd]
        self._unending.add(pidfd)
        near.close()
        self._running -= 1
        self._turns.see_through(self._start_next)
        self._hand_over(done, {"errno": UNENDING, "detail": "the process cannot be ended"})

    def _on_exit(self, near: socket.socket, pidfd: int, done: Done) -> None:
        """Take the outcome of a process that has ended; else look again later."""
        self._turns.unwatch(pidfd)
        if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
            on_exit = partial(self._on_exit, near, pidfd, done)
            self._turns.call_in(LOOK_AGAIN_SECONDS, on_exit)
            return
        os.close(pidfd)
        if pidfd in self._unending:
            self._unending.discard(pidfd)
            return
        self._under_way.pop(pidfd, None)
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


def _busy_seconds(pid: int) -> float:
    """How long a process has run or been ready to: proc_pid_schedstat(5).

    0 where the kernel does not tell (CONFIG_SCHED_INFO): all its time counts as waiting, then.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/schedstat", "rb") as file:
        return sum(map(int, file.read().split()[:2])) / 1e9
    return 0.0


def _failure(error: OSError) -> channel.Message:
    return {"errno": error.errno or errno.EIO, "detail": str(error.filename or "")}
