"""The program's standard streams: lines for people, errors, and a job's bytes.

Lines go through Python's text layer. A worker thread writes a job's bytes directly to the file
descriptor, so a slow reader (a pager, for example) blocks neither the connection nor Ctrl-C. On
request, control bytes of a job are made visible if the stream is a terminal.
"""

import logging
import os
import select
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TextIO

import asyncclick as click
import trio

from jobworker.cli.command_line.failures import (
    CLOSED,
    INTERRUPTED,
    cannot_print,
    one_line,
    print_note,
)
from jobworker.cli.worker_cli.control_characters import TerminalFilter
from jobworker.cli.worker_cli.render import error_as_json
from jobworker.errors import JobworkerError
from jobworker.model.job import Stream
from jobworker.threads import in_thread

PROGRAM = "worker-cli"
MOST_BYTES = 1 << 20
MOST_PIECES = 1024
"""A flush is due after so many bytes or pieces: some milliseconds of work for the thread."""


def print_error(error: JobworkerError, *, json: bool) -> None:
    """Print an error on standard error: one line, in words or as JSON."""
    print_note(error_as_json(error) if json else f"{PROGRAM}: {one_line(str(error))}")


class LogPrinter(logging.Handler):
    """Prints the warnings that the client's modules log, such as a key that others can read."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        print_note(f"{PROGRAM}: {one_line(record.getMessage())}")


class LossReporter:
    """Prints one line for each lost connection: the reason, and what the program does next.

    Two callers report the same loss: first the code that prints output, then the client that makes
    a new connection. The second report is dropped.
    """

    def __init__(self) -> None:
        self._printed = ""

    def report_resume(self, lost: JobworkerError, offset: int) -> None:
        """Print that output will resume at `offset` over a new connection."""
        self._printed = lost.message
        _print_loss(lost, f"going on from byte {offset}")

    def report_reconnect(self, lost: JobworkerError) -> None:
        """Print that the client is making a new connection, unless this loss was printed."""
        printed, self._printed = self._printed, ""
        if printed != lost.message:
            _print_loss(lost, "trying again")


def _print_loss(lost: JobworkerError, plan: str) -> None:
    fact = lost.message.removeprefix("cannot go on: ")  # wrong here: the program does go on
    print_note(f"{PROGRAM}: {one_line(fact)}; {plan}")


class OutputWriter:
    """Writes bytes to the standard streams, in the order in which they were put in.

    A thread for each small piece would cost far more than the write. So the caller puts in all
    pieces that it has, and one `flush` writes them together.
    """

    def __init__(self, streams: Mapping[Stream, TextIO | None], *, visible: bool) -> None:
        """`streams` has None for a closed one. `visible`: show control bytes on a terminal."""
        self._descriptors = {
            stream: file.fileno() for stream, file in streams.items() if file is not None
        }
        self._filters = {
            stream: TerminalFilter()
            for stream, file in streams.items()
            if visible and file is not None and file.isatty()
        }
        self._pieces: list[tuple[int, bytes]] = []
        self._size = 0

    @property
    def has_room(self) -> bool:
        """Whether the caller may put in more before it flushes."""
        return self._size < MOST_BYTES and len(self._pieces) < MOST_PIECES

    def put(self, stream: Stream, data: bytes, *, final: bool = False) -> None:
        """Add bytes to the next write. `final`: nothing follows, so write held-back bytes too.

        Raises PrintFailed if standard output is closed. Bytes for a closed standard error are
        dropped: the user has closed it on purpose.
        """
        descriptor = self._descriptors.get(stream)
        if descriptor is None:
            if data and stream is Stream.STDOUT:
                raise cannot_print(CLOSED)
            return
        if stream in self._filters:
            data = self._filters[stream].feed(data, final=final)
        if data:
            self._pieces.append((descriptor, data))
            self._size += len(data)

    async def flush(self) -> None:
        """Write all bytes that were put in. A cancellation may leave a part unwritten."""
        pieces, self._pieces, self._size = self._pieces, [], 0
        if pieces:
            await in_thread(_write_all, pieces, abandon_on_cancel=True)


def _write_all(pieces: Sequence[tuple[int, bytes]]) -> None:
    for descriptor, run in groupby(pieces, itemgetter(0)):
        rest = memoryview(b"".join([data for _, data in run]))
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:  # another process has made the shared terminal non-blocking
                select.select([], [descriptor], [])


@contextmanager
def cancelled_by_interrupt() -> Iterator[trio.CancelScope]:
    """A block that Ctrl-C cancels, unless SIGINT is ignored. The scope has `cancelled_caught`."""
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN:
            yield scope
            return
        signal.signal(signal.SIGINT, lambda *_: token.run_sync_soon(scope.cancel))
        try:
            yield scope
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """A block in which a command requests changes: Ctrl-C ends it, and the program with code 130.

    Inside it, `print_at_interrupt` prints a line at Ctrl-C.
    """
    with cancelled_by_interrupt() as scope:
        yield
    if scope.cancelled_caught:
        raise click.exceptions.Exit(INTERRUPTED)


@contextmanager
def print_at_interrupt(line: str) -> Iterator[None]:
    """A part of a block of `ended_by_interrupt`: print `line`, if not "", when Ctrl-C ends it."""
    try:
        yield
    except trio.Cancelled:
        if line:
            print_note(line)
        raise


def explain_interrupt(perhaps: str) -> AbstractContextManager[None]:
    """For a call that changes something: print `perhaps` when Ctrl-C ends the wait for its reply.

    The server may have received the request and carry it out. `perhaps` says what may have been
    done and how to find out, as the error does after a broken connection.
    """
    return print_at_interrupt(f"{PROGRAM}: interrupted: {perhaps}")
