"""The program's own streams: lines for people, errors, and a job's bytes.

Lines go through Python's text layer. A job's bytes go past it, to the file descriptor, from a
thread: a reader that is slow (a pager, say) must stop neither the connection nor Ctrl-C. On a
terminal, bytes that it would act upon are made visible where that is asked for.
"""

import logging
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TextIO

import asyncclick as click
import trio

from jobworker.cli.failures import CLOSED, INTERRUPTED, cannot_print, one_line, print_note
from jobworker.cli.render import error_as_json
from jobworker.cli.terminal import TerminalFilter
from jobworker.errors import JobworkerError
from jobworker.model.job import Stream
from jobworker.threads import in_thread

PROGRAM = "worker-cli"
MOST_BYTES = 1 << 20
MOST_PIECES = 1024
"""What is gathered for one write, at the least: some milliseconds' work."""


def say(text: str) -> None:
    """Print a line, or lines, on standard output. Raises PrintFailed where it is closed."""
    if sys.stdout is None:
        raise cannot_print(CLOSED)
    click.echo(text)


def tell(error: JobworkerError, *, json: bool) -> None:
    """Print an error on standard error: one line, in words or as JSON."""
    print_note(error_as_json(error) if json else f"{PROGRAM}: {one_line(str(error))}")


class Notes(logging.Handler):
    """Prints what the client's modules have to warn of, an open key say, as lines of our own."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        print_note(f"{PROGRAM}: {one_line(record.getMessage())}")


class Losses:
    """Says that a connection was lost and what is done about it: in one line for each loss.

    The code that prints output hears of a loss, and then the client that makes a new connection.
    """

    def __init__(self) -> None:
        self._told = ""

    def going_on(self, lost: JobworkerError, offset: int) -> None:
        """Say that output goes on from `offset` once there is a connection."""
        self._told = lost.message
        _note_lost(lost, f"going on from byte {offset}")

    def trying_again(self, lost: JobworkerError) -> None:
        """Say that a new connection is made, unless this loss was told."""
        told, self._told = self._told, ""
        if told != lost.message:
            _note_lost(lost, "trying again")


def _note_lost(lost: JobworkerError, plan: str) -> None:
    fact = lost.message.removeprefix("cannot go on: ")  # for it does go on
    print_note(f"{PROGRAM}: {one_line(fact)}; {plan}")


class Outlet:
    """The standard streams, for bytes: what is put in comes out in that order.

    Where output comes in many small pieces, a thread for each costs far more than the pieces. So
    they are gathered: put in what there is, and then flush.
    """

    def __init__(self, streams: Mapping[Stream, TextIO | None], *, visible: bool) -> None:
        """Take `streams`, None where one is closed; `visible` asks for a terminal's protection."""
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
        """Whether more may be put in before a flush."""
        return self._size < MOST_BYTES and len(self._pieces) < MOST_PIECES

    def put(self, stream: Stream, data: bytes, *, final: bool = False) -> None:
        """Put in what is to be written; `final` takes what was held back for what follows.

        Raises PrintFailed where standard output is closed. Who closes standard error wants to
        have nothing of it.
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
        """Write all that was put in; what cancellation interrupts is written in part."""
        pieces, self._pieces, self._size = self._pieces, [], 0
        if pieces:
            await in_thread(_write_all, pieces, abandon_on_cancel=True)


def _write_all(pieces: Sequence[tuple[int, bytes]]) -> None:
    for descriptor, run in groupby(pieces, itemgetter(0)):
        rest = memoryview(b"".join([data for _, data in run]))
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:  # someone who shares the terminal made it non-blocking
                select.select([], [descriptor], [])


@contextmanager
def cancelled_by_interrupt() -> Iterator[trio.CancelScope]:
    """A block that Ctrl-C cancels (the scope tells), where nobody has SIGINT ignored."""
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
    """A block in which a command asks for changes: Ctrl-C ends it, and the program with 130.

    What Ctrl-C leaves open is told by `told_at_interrupt`.
    """
    with cancelled_by_interrupt() as scope:
        yield
    if scope.cancelled_caught:
        raise click.exceptions.Exit(INTERRUPTED)


@contextmanager
def told_at_interrupt(line: str) -> Iterator[None]:
    """A part of such a block: where Ctrl-C ends it, `line` is told, if there is one."""
    try:
        yield
    except trio.Cancelled:
        if line:
            print_note(line)
        raise


def asking(perhaps: str) -> AbstractContextManager[None]:
    """A call that changes something: where Ctrl-C ends the wait for its answer, what to do then.

    The server may have the request and go on, so a person is told as much as where a connection
    breaks.
    """
    return told_at_interrupt(f"{PROGRAM}: interrupted: {perhaps}")
