"""Standard error of the service: a stream that never makes its writer wait.

The log may lead to a pipe whose reader has stopped, to a terminal that is held (Ctrl-S), or to a
disk that is full, frozen or gone. write(2) then waits or fails, and the event loop must do neither.
So a write puts its text into a bounded queue, and a daemon thread writes the queue out, in order.
What finds no room in the queue is dropped and counted; the number is told as soon as there is room
again. The end of the process waits a bounded moment for the queue (`drain`).

The descriptor is not made non-blocking: O_NONBLOCK belongs to the open file description, which
others share (the shell's terminal, the launcher's log).

Until `start_thread`, writes go out at once if the descriptor takes them (poll(2), in pieces that a
writable pipe takes whole), and stay in the queue otherwise. So it is where no thread can be had:
only there a disk may hold the writer up, since poll(2) calls every regular file writable.

Whoever is told something looks for the line in a regular file, and whoever looks into a crash for
the last ones. So a write to one gives the thread a moment, as long as that is short: a disk may be
slow, and on a busy host the thread waits for a processor.
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
"""The most that waits to be written: some thousand lines."""
BATCH_BYTES = 1 << 16
PIECE_BYTES = 4096
"""PIPE_BUF: a pipe that poll(2) calls writable takes that much at once; pipe(7)."""
AGAIN_SECONDS = 0.1
PROMPT_SECONDS = 0.001
"""How long a write to a regular file waits for the thread, which mostly has it there in 0.1 ms."""
PROMPT_AGAIN_SECONDS = 1.0
"""Once a write has waited so long none waits for this time: a thousandth of it is lost so."""
END_SECONDS = 1.0
"""How long the end of the process waits for a reader of the log."""


def _plain_note(lines: int) -> str:
    return f"{lines} lines before this one were lost\n"


class StandardError(io.TextIOBase):
    """A text stream to a file descriptor; none of its methods raises.

    `drain` waits, and a write to a regular file a moment (PROMPT_SECONDS); nothing else does.
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
        """From when on a write gives the thread a moment."""
        self.note: Callable[[int], str] = _plain_note
        """Says how many lines were lost, in a line of the log's form."""

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
        """Put text into the queue, or drop it where there is no room."""
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
        """Have a thread write from now on. Call once the process has become what it is to be.

        fork(2) must not find other threads, and prctl(2) changes the calling thread alone.
        """
        with self._changed:
            with suppress(OSError):
                if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                    self._prompt_from = -math.inf
            self._wants_thread = True
            self._try_thread()

    def drain(self, seconds: float) -> None:
        """Wait until all is written, but at most so long."""
        until = time.monotonic() + seconds
        with self._changed:
            if self._has_thread:
                self._changed.wait_for(self._is_idle, seconds)
                return
            while not self._is_idle() and (left := until - time.monotonic()) > 0:
                if not self._write_at_once(left):
                    return

    def _put(self, data: bytes) -> None:
        # Once something was dropped, half of the room has to be free: one note for many lines.
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
        with suppress(RuntimeError):  # there is none to be had; the next write tries again
            threading.Thread(target=self._serve, name="standard error", daemon=True).start()
            self._has_thread = True

    def _serve(self) -> None:
        while True:
            try:
                self._serve_batch()
            except Exception:  # noqa: BLE001 - such as MemoryError; what was taken is lost
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
        """What to write next, and how many lost lines it tells of."""
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
        if problem:  # of what it tells nobody has heard; its own line is not one of those lost
            self._lost_lines += batch.count(b"\n") - bool(told) + told

    def _write_out(self, batch: bytes) -> bool:
        """Write, however long it takes; whether it failed."""
        rest = memoryview(batch)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # someone who shares the file has made it non-blocking
                    select.select([], [self._descriptor], [])
        except OSError:
            return True
        return False

    def _write_at_once(self, seconds: float) -> bool:
        """Write all that the descriptor takes within this time; whether all was written."""
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


def be_patient() -> StandardError:
    """Put such a stream in the place of `sys.stderr`, for the rest of the process."""
    stream = StandardError()
    sys.stderr = stream
    atexit.register(stream.drain, END_SECONDS)
    return stream
