"""The launcher's side of the fork server: calls for processes and groups that never block.

`done` gets the answer to a call in a later turn. Calls are answered in their order. If the fork
server ends, the launcher starts another one and repeats the calls that were not answered:
`sandbox.fork_server` says why this is safe. A process that the old fork server made without an
answer is a stray: a child of the launcher for which the launcher has no pidfd. The launcher kills
strays.

The launcher kills a fork server that answers nothing for `MOST_SECONDS`, since no job could be
started any more. It counts the time in calls of `_look`, not by the clock: a launcher that was
itself stopped for a while then kills no fork server.

Standard library only.
"""

import contextlib
import errno
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from jobworker.errors import ProtocolError
from jobworker.sandbox import channel, fork_server
from jobworker.sandbox.channel import Message
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.fork_server import Function
from jobworker.sandbox.log import log_line

AT_ONCE = 4
"""How many calls may be sent and not answered: so many fit in the socket's buffer, and the fork
server does not have to wait for the next one."""
TRIES = 3
"""A call fails if the fork server has ended this often before it answered the call."""
AGAIN_SECONDS = 0.1
LOOK_SECONDS = 1.0
MOST_SECONDS = 60.0
"""The launcher kills a fork server that answers nothing for so long. The longest hold of the
kernel's lock that was measured is 3.4 s."""
DIED = errno.EOWNERDEAD
"""The errno of a call for which the fork server has ended. No system call that the fork server
makes fails with this errno."""

Done = Callable[[Message, list[int]], None]
"""Called with the answer, or with {"errno": …, "detail": …}, and with descriptors, which it owns
from then on."""


class _Call(NamedTuple):
    body: bytes
    descriptors: Sequence[int]
    done: Done
    repeat: bool
    tries: int = 0


class ForkServer:
    """The fork server's process and the calls to it.

    `functions` and `kept` are as for `fork_server.start`. The launcher never closes the descriptors
    in `kept`, since a later fork server needs them too. Raises OSError.

    One with another `name` makes no processes: `launcher.host_names`. So it leaves no strays, and
    must not take for strays what the fork server is about to answer.
    """

    def __init__(
        self,
        event_loop: EventLoop,
        functions: Mapping[str, Function],
        kept: Sequence[int] = (),
        name: str = fork_server.NAME,
    ) -> None:
        self._event_loop, self._functions, self._kept = event_loop, functions, kept
        self._name = name
        self._waiting: deque[_Call] = deque()
        self._sent: deque[_Call] = deque()
        self._sock: socket.socket | None = None
        """None while there is no fork server."""
        self._pidfd = -1
        self._looks = 0
        self._strays: set[int] = set()
        """The pids of strays that were killed and are not reaped yet."""
        self._start()

    def call(
        self,
        name: str,
        arguments: Sequence[object],
        done: Done,
        descriptors: Sequence[int] = (),
        *,
        repeat: bool = True,
    ) -> None:
        """Call a function in the fork server. `done` gets the answer in a later turn.

        The fork server gets duplicates of `descriptors`; the caller keeps its own open until `done`
        is called. If the fork server ends before it answers, the next one is called again, up to
        `TRIES` times in all; without `repeat` the call fails with `DIED` at once. Raises OSError
        (EMSGSIZE) if the arguments or the descriptors are too many for a call.
        """
        body = fork_server.pack_call(name, arguments)
        if len(body) > channel.MAX_BODY_BYTES or len(descriptors) >= fork_server.MAX_PASSED:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        self._waiting.append(_Call(body, descriptors, done, repeat))
        self._send_more()

    @property
    def is_idle(self) -> bool:
        """Whether all calls are answered and all strays are reaped."""
        return not (self._waiting or self._sent or self._strays)

    def close(self) -> None:
        """Kill the fork server and wait for its end. For tests: else it ends with the launcher."""
        if self._sock is not None:
            self._event_loop.unwatch(self._sock.fileno())
            self._sock.close()
        if self._pidfd >= 0:
            self._event_loop.unwatch(self._pidfd)
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            os.close(self._pidfd)

    # --- asking -----------------------------------------------------------------------------

    def _send_more(self) -> None:
        while self._sock is not None and self._waiting and len(self._sent) < AT_ONCE:
            call = self._waiting[0]
            try:
                packet, ancillary, mine = channel.pack(call.body, call.descriptors)
                try:
                    self._sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)
                finally:
                    channel.close_all(mine)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                self._send_later()  # if the fork server has ended, its pidfd shows it
                return
            except (OSError, ProtocolError) as error:  # no descriptor or no memory is left
                self._waiting.popleft()
                code = error.errno if isinstance(error, OSError) else None
                failed = _failure(code or errno.EMSGSIZE, str(error))
                # Later, since the caller is still in `call` and has recorded nothing of it.
                told = partial(self._event_loop.call_with_retries, _Told(call.done, failed, []))
                self._event_loop.call_later(0, told)
                continue
            self._sent.append(self._waiting.popleft())
            if not self._event_loop.is_scheduled(self._look):
                self._looks = 0
                self._event_loop.call_later(LOOK_SECONDS, self._look)

    def _send_later(self) -> None:
        if not self._event_loop.is_scheduled(self._send_more):
            self._event_loop.call_later(AGAIN_SECONDS, self._send_more)

    def _on_answer(self) -> None:
        """Read one answer without blocking, and pass it to the `done` of its call."""
        assert self._sock is not None
        try:
            try:
                received = channel.receive(self._sock)
            except ConnectionResetError:  # reported once, before the answers that are still unread
                received = channel.receive(self._sock)
        except BlockingIOError:
            return
        except channel.DescriptorsLost as error:
            channel.close_all(error.descriptors)
            self._end_unnamed(error.said or {})
            received = _failure(errno.EMFILE, "the launcher is out of descriptors"), []
        except (OSError, ProtocolError) as error:
            log_line(f"the {self._name} is ended: {error}")
            received = None
        if received is None:  # the fork server has ended, or is to end: `_replace` repeats the rest
            self._event_loop.unwatch(self._sock.fileno())
            self._kill()
            return
        self._looks = 0
        call = self._sent.popleft()
        self._send_more()
        self._event_loop.call_with_retries(_Told(call.done, *received))

    def _end_unnamed(self, said: Message) -> None:
        """Kill the processes of an answer whose descriptors were lost. Their pids are in `said`.

        The pids are still theirs, since nothing but the launcher can reap them.
        """
        for name in ("pid", "gateway_pid"):
            pid = said.get(name)
            if isinstance(pid, int):
                self.end(pid)

    # --- its end ----------------------------------------------------------------------------

    def _start(self) -> None:
        """Clone a fork server and send it the calls that wait. Raises OSError.

        Here the launcher itself may wait for the kernel's locks on groups. That is rare: only a
        process with root's rights on the host can end a fork server.
        """
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        try:
            with far:
                _, pidfd = fork_server.start(self._name, self._functions, self._kept, far)
        except OSError:
            near.close()
            raise
        self._sock, self._pidfd = near, pidfd
        self._watch()
        self._send_more()

    def _watch(self) -> None:
        assert self._sock is not None
        try:
            if not self._event_loop.watches(self._pidfd):
                self._event_loop.watch(self._pidfd, self._on_exit)
            if not self._event_loop.watches(self._sock.fileno()):
                self._event_loop.watch(self._sock.fileno(), self._on_answer)
        except OSError:  # epoll(7) has no memory, or its limit on watches is reached
            self._event_loop.call_later(AGAIN_SECONDS, self._watch)

    def _on_exit(self) -> None:
        """Reap a fork server that has ended; if a tracer still has it, try again later.

        `_replace` then reads its last answers and starts a new one.
        """
        self._event_loop.unwatch(self._pidfd)
        if os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG) is None:
            self._event_loop.call_later(AGAIN_SECONDS, self._watch)  # a tracer on the host has it
            return
        os.close(self._pidfd)
        self._pidfd = -1
        log_line(f"the {self._name} has ended, and another one is made")
        self._event_loop.call_with_retries(self._replace)

    def _replace(self) -> None:
        sock = self._sock
        if sock is not None:
            while self._event_loop.watches(sock.fileno()):
                before = len(self._sent)
                self._on_answer()
                if len(self._sent) == before:
                    break
            self._event_loop.unwatch(sock.fileno())
            self._sock = None
            sock.close()
        if self._name == fork_server.NAME:
            self._end_strays()
        self._ask_anew()
        self._start_again()

    def _kill(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _ask_anew(self) -> None:
        sent, self._sent = self._sent, deque()
        for call in reversed(sent):
            if call.repeat and call.tries + 1 < TRIES:
                self._waiting.appendleft(call._replace(tries=call.tries + 1))
            else:
                failed = _failure(DIED, "the fork server has ended")
                self._event_loop.call_with_retries(_Told(call.done, failed, []))

    def _start_again(self) -> None:
        try:
            self._start()
        except BlockingIOError:  # the reaper is busy for a moment
            self._event_loop.call_later(AGAIN_SECONDS, self._start_again)
        except OSError as error:
            log_line(f"cannot make a {self._name}, and tries again: {error}")
            self._event_loop.call_later(AGAIN_SECONDS, self._start_again)

    def _look(self) -> None:
        """Kill a fork server that has answered nothing for `MOST_SECONDS`."""
        if not self._sent:
            return
        self._event_loop.call_later(LOOK_SECONDS, self._look)
        self._looks += 1
        if self._looks * LOOK_SECONDS > MOST_SECONDS:
            log_line(f"the {self._name} answers nothing for {MOST_SECONDS:.0f} s, and is killed")
            self._looks = 0
            self._kill()

    # --- strays -----------------------------------------------------------------------------

    def _end_strays(self) -> None:
        """Kill the children without a pidfd: their fork server has ended before it answered."""
        try:
            strays = _children() - _named()
        except OSError as error:
            log_line(f"cannot look for what the fork server has left: {error}")
            return
        for pid in strays:
            self.end(pid)

    def end(self, pid: int) -> None:
        """Kill a child for which there is no pidfd, and reap it later.

        Its pid cannot belong to another process before it is reaped.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._strays.add(pid)
        self._event_loop.call_later(AGAIN_SECONDS, self._collect_strays)

    def _collect_strays(self) -> None:
        for pid in list(self._strays):
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
                    continue
            self._strays.discard(pid)
        if self._strays:
            self._event_loop.call_later(AGAIN_SECONDS, self._collect_strays)


class _Told:
    """Calls `done` with an answer, for `EventLoop.call_with_retries`.

    If `done` raises an unexpected exception, the next try calls it with a failure instead.
    Otherwise the caller would wait for the answer for ever.
    """

    def __init__(self, done: Done, message: Message, descriptors: list[int]) -> None:
        self._done, self._answer = done, (message, descriptors)

    def __call__(self) -> None:
        message, descriptors = self._answer
        self._answer = _failure(errno.EPROTO, "an unexpected fault, which the log has"), []
        self._done(message, descriptors)


def _failure(code: int, detail: str) -> Message:
    return {"errno": code, "detail": detail}


def _children() -> set[int]:
    """The pids of all children of this thread, which makes them all: proc_pid_children(5)."""
    with open("/proc/thread-self/children", encoding="ascii") as file:
        return set(map(int, file.read().split()))


def _named() -> set[int]:
    """The pids for which this process has a pidfd: pidfd_open(2), proc_pid_fdinfo(5)."""
    named = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "pidfd" in os.readlink(f"/proc/self/fd/{number}"):
                with open(f"/proc/self/fdinfo/{number}", encoding="ascii") as file:
                    named |= {int(line.split()[1]) for line in file if line.startswith("Pid:")}
    return named
