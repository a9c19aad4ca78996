"""Chores: work on file systems or on jobs' processes that may take long, a process for each.

The launcher's one thread must not wait for a disk. unlink(2) of a volume with many extents takes
seconds, and even to read a directory waits for the journal of a file system that jobs write to. So
such work is a function that runs in a process of its own and returns a message. The launcher goes
on meanwhile, and gets the outcome in a later turn. The fork server makes the process
(`sandbox.forks`), so the work is pickled: a function of a module, and plain arguments. The process
has only the descriptors that the chore names, at the same numbers as in the launcher.

A bounded number of chores run at a time, and a bounded number wait. `start` refuses more with
`CROWDED`.

A chore that inspects a job's processes may block on a kernel lock that the job holds, and then even
SIGKILL may not end it. Such chores have a time limit. The launcher enforces it, because a blocked
process cannot. A chore that does not end after SIGKILL fails with `UNENDING`, and another one may
start in its place. If too many of these processes are left, `start` refuses every chore with
`CROWDED`. The launcher counts the time in calls of `_look`, not by the clock: a launcher that was
itself stopped for a while then kills no chore.

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
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.fork_server import GO, Work
from jobworker.sandbox.forks import ForkServer

CROWDED = errno.EUSERS
"""The errno of a chore for which there is no room. No system call of a chore fails with it."""
LOOK_AGAIN_SECONDS = 0.1
"""The pause before the launcher checks again a process that epoll cannot watch, or that cannot be
reaped yet."""
UNENDING = errno.ETIMEDOUT
"""The errno of a chore that was killed and has not ended."""
MOST_WAITING_SECONDS = 3.0
"""The time limit for waits other than for a processor. A chore that inspects jobs mostly computes,
so a longer wait means that it is blocked."""
MOST_SECONDS = 60.0
"""The time limit in all, with the time in which it runs or waits for a processor."""
LOOK_SECONDS = 1.0

Done = Callable[[channel.Message], None]
"""Called with the message that the work returned, or with {"errno": …, "detail": …} if it failed.
The latter has "begun": False if the work has not begun, since no process could be made."""


class _Chore(NamedTuple):
    work: Work
    done: Done
    holding: Sequence[int]
    given: Sequence[int]


class _UnderWay:
    """A process with a time limit."""

    def __init__(self, pid: int, give_up: Callable[[], None]) -> None:
        self._pid, self.give_up, self.is_killed = pid, give_up, False
        self._looks, self._busy_before = 0, _busy_seconds(pid)

    def is_overdue(self) -> bool:
        """Whether its time is over. The caller has to call this once in `LOOK_SECONDS`."""
        self._looks += 1
        seconds = self._looks * LOOK_SECONDS
        busy = _busy_seconds(self._pid) - self._busy_before
        return seconds - busy > MOST_WAITING_SECONDS or seconds > MOST_SECONDS

    def kill(self, pidfd: int) -> None:
        """Send SIGKILL. The time limit starts again, for the process to end."""
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self.is_killed, self._looks, self._busy_before = True, 0, _busy_seconds(self._pid)


class Chores:
    """Runs up to `at_once` chores at a time and lets up to `waiting` more wait.

    `unending`: how many processes may be left that did not end after SIGKILL. With 0 the chores
    have no time limit.
    """

    def __init__(
        self,
        event_loop: EventLoop,
        forks: ForkServer,
        *,
        at_once: int,
        waiting: int,
        unending: int = 0,
    ) -> None:
        self._event_loop, self._forks, self._at_once, self._room = (
            event_loop,
            forks,
            at_once,
            waiting,
        )
        self._most_unending = unending
        self._under_way: dict[int, _UnderWay] = {}
        """The processes with a time limit, by pidfd."""
        self._unending: set[int] = set()
        self._waiting: deque[_Chore] = deque()
        self._running = 0

    @property
    def running(self) -> int:
        """How many chores are running, without those that did not end after SIGKILL."""
        return self._running

    def start(
        self,
        work: Work,
        done: Done,
        holding: Sequence[int] = (),
        given: Sequence[int] = (),
    ) -> None:
        """Do the work in a process of its own, now or when another chore has ended.

        The process gets duplicates of the descriptors in `holding`, which the caller keeps open
        until `done` is called, and of those in `given`, which the launcher closes before the work
        begins. So the process, not the launcher, makes the last close(2) of those. If the work does
        not begin, they stay open, and `done` has to care for them. Raises OSError: `CROWDED` if
        there is no room, others if the fork server cannot be called.
        """
        chore = _Chore(work, done, holding, given)
        if self._running < self._at_once:
            self._run(chore)
        elif len(self._waiting) < self._room:
            self._waiting.append(chore)
        else:
            raise OSError(CROWDED, "too many chores wait")

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
        """Let a new process begin its work, or report that none could be made."""
        far.close()
        pid = answer.get("pid")
        if not isinstance(pid, int):
            near.close()
            self._running -= 1
            self._event_loop.call_with_retries(self._start_next)
            self._hand_over(chore.done, {**answer, "begun": False})
            return
        (pidfd,) = descriptors
        channel.close_all(chore.given)
        on_exit = partial(self._on_exit, near, pidfd, chore.done)
        try:
            # Only its end is watched: it sends the outcome just before it ends.
            self._event_loop.watch(pidfd, on_exit)
        except OSError:  # epoll(7) has no memory, or its limit on watches is reached
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, on_exit)
        if self._most_unending:
            give_up = partial(self._give_up, near, pidfd, chore.done)
            self._under_way[pidfd] = _UnderWay(pid, give_up)
            if not self._event_loop.is_scheduled(self._look):
                self._event_loop.call_later(LOOK_SECONDS, self._look)
        with contextlib.suppress(OSError):  # the process was killed already
            near.send(GO, socket.MSG_NOSIGNAL)

    def _look(self) -> None:
        """Kill each chore that is overdue, and give up each one that SIGKILL has not ended."""
        if self._under_way:
            self._event_loop.call_later(LOOK_SECONDS, self._look)
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
        self._event_loop.call_with_retries(self._start_next)
        self._hand_over(done, {"errno": UNENDING, "detail": "the process cannot be ended"})

    def _on_exit(self, near: socket.socket, pidfd: int, done: Done) -> None:
        """Reap a process and pass on its outcome. If it cannot be reaped yet, try again later."""
        self._event_loop.unwatch(pidfd)
        if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is None:
            on_exit = partial(self._on_exit, near, pidfd, done)
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, on_exit)
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
            except channel.DescriptorsLost as error:  # a long outcome travels in a descriptor
                channel.close_all(error.descriptors)
                outcome = {"errno": errno.EMFILE, "detail": "no descriptor is left for its outcome"}
            except channel.BadMessage as error:
                channel.close_all(error.descriptors)
            except OSError:
                pass  # it was killed before it sent an outcome
        self._event_loop.call_with_retries(self._start_next)
        self._hand_over(done, outcome)

    def _start_next(self) -> None:
        while self._waiting and self._running < self._at_once:
            chore = self._waiting.popleft()
            try:
                self._run(chore)
            except OSError as error:  # no descriptor is left
                self._hand_over(chore.done, {**fork_server.failure(error), "begun": False})

    def _hand_over(self, done: Done, outcome: channel.Message) -> None:
        """Call `done` with an outcome. If it raises, call it again with a failure.

        Otherwise the caller of `start` would wait for the outcome for ever.
        """
        try:
            done(outcome)
        except Exception:  # noqa: BLE001 - recorded
            incident = self._event_loop.record("the outcome of a chore")
            done({"errno": errno.EPROTO, "detail": f"an unexpected fault, incident {incident}"})


def _busy_seconds(pid: int) -> float:
    """The seconds in which a process ran or waited for a processor: proc_pid_schedstat(5).

    Returns 0 if the kernel does not count them (CONFIG_SCHED_INFO). All time is then waiting time.
    """
    with contextlib.suppress(OSError), open(f"/proc/{pid}/schedstat", "rb") as file:
        return sum(map(int, file.read().split()[:2])) / 1e9
    return 0.0
