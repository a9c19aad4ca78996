"""The program's own streams: lines for people, errors, and a job's bytes.

Lines go through Python's text layer. A job's bytes go past it, to the file descriptor, from a
thread: a reader that is slow (a pager, say) must stop neither the connection nor Ctrl-C. On a
terminal, bytes that it would act upon are made visible where that is asked for.
"""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import asyncclick as click
import trio

from jobworker.cli.failures import one_line
from jobworker.cli.render import error_as_json
from jobworker.cli.terminal import TerminalFilter
from jobworker.errors import JobworkerError

PROGRAM = "worker-cli"
BROKEN_PIPE = 141
"""128 + SIGPIPE, as shells have it."""


def say(text: str) -> None:
    """Print a line, or lines, on standard output."""
    click.echo(text)


def note(text: str) -> None:
    """Print a line on standard error."""
    click.echo(text, err=True)


def tell(error: JobworkerError, *, json: bool) -> None:
    """Print an error on standard error: one line, in words or as JSON."""
    note(error_as_json(error) if json else f"{PROGRAM}: {one_line(str(error))}")


def note_lost(lost: JobworkerError, plan: str) -> None:
    """Say that a connection was lost, and what is done about it."""
    fact = lost.message.removeprefix("cannot go on: ")  # for it does go on
    note(f"{PROGRAM}: {one_line(fact)}; {plan}")


def discard_output() -> None:
    """Let what is still buffered for standard output vanish, instead of failing at exit."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Sink:
    """One of the standard streams, for bytes."""

    def __init__(self, stream: TextIO | None, *, visible: bool) -> None:
        """Take `stream`, None where it is closed; `visible` asks for a terminal's protection."""
        self._descriptor = None if stream is None else stream.fileno()
        self._filter = TerminalFilter() if visible and stream and stream.isatty() else None

    async def write(self, data: bytes) -> None:
        """Write all of `data`; what cancellation interrupts is written in part."""
        await self._write(data if self._filter is None else self._filter.feed(data))

    async def finish(self) -> None:
        """Write what was held back until it was known what follows."""
        if self._filter is not None:
            await self._write(self._filter.feed(b"", final=True))

    async def _write(self, data: bytes) -> None:
        if self._descriptor is not None and data:
            await trio.to_thread.run_sync(
                _write_all, self._descriptor, data, abandon_on_cancel=True
            )


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
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
