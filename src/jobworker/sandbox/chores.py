"""Chores: work on file systems that may take long, each done by a process of its own.

The launcher's one thread must not wait for a disk: unlink(2) of a volume with many extents takes
seconds, and even a look into a directory waits for the journal of a file system that jobs write
to. So such work is a function that runs in a process of its own and returns a message; the launcher
goes on meanwhile, and hears of the outcome in a later turn. The fork server makes the process
(`sandbox.forks`), so the work is pickled: a function of a module, and plain arguments. It has the
descriptors that it is given, and no others of the launcher's, at the launcher's numbers.

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
from typing import NamedTuple

from jobworker.sandbox import channel, fork_server
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.fork_server import GO, Work
from jobworker.sandbox.forks import ForkServer

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

Done = Callable[[channel.Message], None]
"""Gets what the work returned, or {"errno": …} with "detail" where it failed; the latter with
"begun" False where it has not begun, since there was no process to be had."""


class _Chore(NamedTuple):
    work: Work
    done: Done
    holding: Sequence[int]
    given: Sequence[int]


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

    def __init__(
        self, turns: Turns, forks: ForkServer, *, at_once: int, waiting: int, unending: int = 0
    ) -> None:
        self._turns, self._forks, self._at_once, self._room = turns, forks, at_once, waiting
        self._most_unending = unending
        self._under_way: dict[int, _UnderWay] = {}
        """By pidfd, where they have an end."""
        self._unending: set[int] = set()
        self._waiting: deque[_Chore] = deque()
        self._running = 0

    @property
    def running(self) -> int:
        """How many are under way; those that cannot be ended are not counted."""
        return self._running

    def start(
        self,
        work: Work,
        done: Done,
        holding: Sequence[int] = (),
        given: Sequence[int] = (),
    ) -> None:
        """Have the work done, now or later. Raises OSError, `CROWDED` where too much waits.

        The process has the descriptors in `holding`, which stay open here until it is done, and
        those in `given`, which are closed here before it begins: so the last close of them is never
        made here. Where it does not begin, they are left to `done`.
        """
        chore = _Chore(work, done, holding, given)
        if self._running < self._at_once:
            self._run(chore)
        elif len(self._waiting) < self._room:
            self._waiting.append(chore)
        else:
            raise OSError(CROWDED, "too much waits")

    def _run(self, chore: _Chore) -> None:
        if len(self._unending) >= self._most_unending > 0:
            raise OSError(CROWDED, "too many processes are left that cannot be ended")
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        passed = [far.fileno(), *chore.holding, *chore.given]
        try:
            made = partial(self._on_made, near, far, chore)
            self._forks.call("run", (chore.work, passed), made, passed)
        except BaseException:
            near.close()
            far.close()
            raise
        self._running += 1

    def _on_made(
        self,
        near: socket.socket,
        far: socket.socket,
        chore: _Chore,
        answer: channel.Message,
        descriptors: list[int],
    ) -> None:
        """Its process is there, and may begin; or there is none."""
        far.close()
        pid = answer.get("pid")
        if not isinstance(pid, int):
            near.close()
            self._running -= 1
            self._turns.see_through(self._start_next)
            self._hand_over(chore.done, {**answer, "begun": False})
            return
        (pidfd,) = descriptors
        channel.close_all(chore.given)
        on_exit = partial(self._on_exit, near, pidfd, chore.done)
        try:
            # The process has said its word before it ends, and its end is soon after.
            self._turns.watch(pidfd, on_exit)
        except OSError:  # of epoll: no memory, or no more watches to be had
            self._turns.call_in(LOOK_AGAIN_SECONDS, on_exit)
        if self._most_unending:
            give_up = partial(self._give_up, near, pidfd, chore.done)
            self._under_way[pidfd] = _UnderWay(pid, give_up)
            if not self._turns.is_set(self._look):
                self._turns.call_in(LOOK_SECONDS, self._look)
        with contextlib.suppress(OSError):  # it was killed already
            near.send(GO, socket.MSG_NOSIGNAL)

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
            chore = self._waiting.popleft()
            try:
                self._run(chore)
            except OSError as error:  # no descriptor to be had
                self._hand_over(chore.done, {**fork_server.failure(error), "begun": False})

    def _hand_over(self, done: Done, outcome: channel.Message) -> None:
        """Tell an outcome; one that meets an unexpected fault is told as a failure.

        Whoever asked would wait for ever.
        """
        try:
            done(outcome)
        except Exception:  # noqa: BLE001 - recorded
            incident = self._turns.record("the outcome of a chore")
            done({"errno": errno.EPROTO, "detail": f"an unexpected fault, incident {incident}"})


def _busy_seconds(pid: int) -> float:
    """How long a process has run or been ready to: proc_pid_schedstat(5).

    0 where the kernel does not tell (CONFIG_SCHED_INFO): all its time counts as waiting, then.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/schedstat", "rb") as file:
        return sum(map(int, file.read().split()[:2])) / 1e9
    return 0.0
