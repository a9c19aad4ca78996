"""Standard error of the service: a stream whose writes do not block the event loop.

The log may go to a pipe whose reader has stopped, to a terminal that is held (Ctrl-S), or to a disk
that is full, frozen or gone. write(2) then waits or fails, and the event loop must do neither. So a
write puts its text into a bounded queue, and a daemon thread writes the queue out, in order. A line
that finds no room in the queue is dropped and counted. A line with the number of lost lines follows
as soon as there is room again. At its end the process waits a bounded time for the queue (`drain`).

The descriptor is not made non-blocking: O_NONBLOCK belongs to the open file description, which
other processes share (the shell's terminal, the launcher's log).

Until `start_thread`, a write goes out at once if the descriptor takes it (poll(2), in pieces that a
writable pipe takes whole); otherwise it stays in the queue. The same holds if no thread can be
started. Only then a disk can block the writer, since poll(2) reports every regular file as
writable.

A person reads the log in a regular file, and expects the latest line there; after a crash the last
lines matter most. So a write to a regular file waits a moment for the thread. This wait is short: a
disk may be slow, and on a busy host the thread waits for a processor.
"""

import atexit
import errno
import io
import math
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

ROOM_BYTES = 1 << 20
"""The most bytes in the queue: some thousand lines."""
BATCH_BYTES = 1 << 16
PIECE_BYTES = 4096
"""PIPE_BUF: a pipe that poll(2) reports as writable takes that many bytes at once; pipe(7)."""
AGAIN_SECONDS = 0.1
PROMPT_SECONDS = 0.001
"""How long a write to a regular file waits for the thread, which mostly needs 0.1 ms."""
PROMPT_AGAIN_SECONDS = 1.0
"""After a write has waited for all of `PROMPT_SECONDS`, no write waits for this time. So at most a
thousandth of the time is lost."""
END_SECONDS = 1.0
"""How long the process waits at its end until the queue is written."""


def _plain_note(lines: int) -> str:
    return f"{lines} lines before this one were lost\n"


class StandardError(io.TextIOBase):
    """A text stream to a file descriptor; none of its methods raises.

    Only `drain` waits, and a write to a regular file for up to PROMPT_SECONDS.
    """

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()  # its lock is reentrant: a warning may come anywhere
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._lost_lines = 0
        self._dropping = False
        self._refused = False
        """Whether the last write failed."""
        self._writing = False
        self._wants_thread = self._has_thread = False
        self._prompt_from = math.inf
        """The time from which a write waits for the thread; infinite if no write does."""
        self.note: Callable[[int], str] = _plain_note
        """Formats the line that reports how many lines were lost, in the log's form."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """See io.TextIOBase."""
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """See io.TextIOBase."""
        return "backslashreplace"

    def writable(self) -> bool:
        """See io.IOBase."""
        return True

    def fileno(self) -> int:
        """See io.IOBase."""
        return self._descriptor

    def isatty(self) -> bool:
        """See io.IOBase."""
        return os.isatty(self._descriptor)

    def write(self, text: str, /) -> int:
        """Put text into the queue, or drop it if there is no room."""
        data = text.encode(self.encoding, self.errors)
        with self._changed:
            was_idle = self._is_idle()
            self._put(data)
            if self._wants_thread and not self._has_thread:
                self._try_thread()
            if self._has_thread:
                self._changed.notify_all()
                if was_idle and time.monotonic() >= self._prompt_from:
                    self._give_a_moment()
            else:
                self._write_at_once(0)
        return len(text)

    def _give_a_moment(self) -> None:
        began = time.monotonic()
        self._changed.wait_for(self._is_idle, PROMPT_SECONDS)
        now = time.monotonic()  # this thread too may have waited for a processor
        if now - began >= PROMPT_SECONDS:
            self._prompt_from = now + PROMPT_AGAIN_SECONDS

    def start_thread(self) -> None:
        """Have a thread write from now on. Call it after the last fork(2) and prctl(2).

        A fork must not happen while there are other threads, and prctl(2) changes only the calling
        thread.
        """
        with self._changed:
            with suppress(OSError):
                if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                    self._prompt_from = -math.inf
            self._wants_thread = True
            self._try_thread()

    def drain(self, seconds: float) -> None:
        """Wait until the thread has written the queue, or write it here if there is no thread.

        Takes at most `seconds`.
        """
        until = time.monotonic() + seconds
        with self._changed:
            if self._has_thread:
                self._changed.wait_for(self._is_idle, seconds)
                return
            while not self._is_idle() and (left := until - time.monotonic()) > 0:
                if not self._write_at_once(left):
                    return

    def _put(self, data: bytes) -> None:
        # After a drop, half of the room must be free again, so that one note covers many lines.
        room = ROOM_BYTES // 2 if self._dropping else ROOM_BYTES
        if self._queued_bytes + len(data) > room:
            self._dropping = True
            self._lost_lines += data.count(b"\n")
            return
        self._dropping = False
        if self._lost_lines and not self._refused:
            self._append(self._take_note())
        self._append(data)

    def _append(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)

    def _take_note(self) -> bytes:
        lines, self._lost_lines = self._lost_lines, 0
        return self.note(lines).encode(self.encoding, self.errors)

    def _is_idle(self) -> bool:
        untold = self._lost_lines > 0 and not self._refused
        return not (self._queue or self._writing or untold)

    def _try_thread(self) -> None:
        with suppress(RuntimeError):  # no thread can be started; the next write tries again
            threading.Thread(target=self._serve, name="standard error", daemon=True).start()
            self._has_thread = True

    def _serve(self) -> None:
        while True:
            try:
                self._serve_batch()
            except Exception:  # noqa: BLE001 - such as MemoryError; the batch is lost
                with self._changed:
                    self._writing = False
                    self._queued_bytes = sum(map(len, self._queue))
                    self._changed.notify_all()
                time.sleep(AGAIN_SECONDS)

    def _serve_batch(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_idle())
            batch, told = self._take_batch()
            self._writing = True
        problem = self._write_out(batch)
        with self._changed:
            self._writing = False
            self._note_outcome(batch, told, problem)
            self._changed.notify_all()

    def _take_batch(self) -> tuple[bytes, int]:
        """Take the next bytes to write, and the number of lost lines that their note reports."""
        pieces: list[bytes] = []
        size = told = 0
        if self._lost_lines and (self._refused or not self._queue):
            told = self._lost_lines
            pieces.append(self._take_note())
            self._dropping = False
        while self._queue and size < BATCH_BYTES:
            piece = self._queue.popleft()
            pieces.append(piece)
            size += len(piece)
        self._queued_bytes -= size
        return b"".join(pieces), told

    def _note_outcome(self, batch: bytes, told: int, problem: bool) -> None:
        self._refused = problem
        if problem:  # the lines that its note reports stay lost; the note itself is not counted
            self._lost_lines += batch.count(b"\n") - bool(told) + told

    def _write_out(self, batch: bytes) -> bool:
        """Write a batch, however long it takes; returns whether that failed."""
        rest = memoryview(batch)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # a process that shares the file made it non-blocking
                    select.select([], [self._descriptor], [])
        except OSError:
            return True
        return False

    def _write_at_once(self, seconds: float) -> bool:
        """Write what the descriptor takes within `seconds`; returns whether all was written."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        while not self._is_idle():
            left = max(0.0, until - time.monotonic())
            events = poll.poll(left * 1000)
            if not events or not events[0][1] & select.POLLOUT:
                return False
            batch, told = self._take_batch()
            piece, rest = batch[:PIECE_BYTES], batch[PIECE_BYTES:]
            try:
                written = os.write(self._descriptor, piece)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    self._put_back(batch)
                    return False
                self._note_outcome(batch, told, problem=True)
                return False
            self._refused = False
            self._put_back(piece[written:] + rest)
        return True

    def _put_back(self, data: bytes) -> None:
        if data:
            self._queue.appendleft(data)
            self._queued_bytes += len(data)


def replace_standard_error() -> StandardError:
    """Replace `sys.stderr` by a `StandardError` for the rest of the process, and return it."""
    stream = StandardError()
    sys.stderr = stream
    atexit.register(stream.drain, END_SECONDS)
    return stream
