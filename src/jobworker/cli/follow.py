"""A job's output on this program's own streams, as it comes, whatever becomes of a connection."""

import base64
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from jobworker.cli import render
from jobworker.cli.console import Losses, Outlet, asking, told_at_interrupt
from jobworker.cli.failures import print_note
from jobworker.cli.terminal import LineStamper
from jobworker.convert import unstructure
from jobworker.json_text import dumps
from jobworker.model.job import JobRecord, JobSpec, Stream, shell_exit_code

if TYPE_CHECKING:
    from jobworker.client.client import Client
    from jobworker.client.following import Chunk
    from jobworker.client.job import JobOutput

    OpenOutput = Callable[..., JobOutput]
    """`Job.output`, with what part of it is wanted."""


MAY_RUN = "the job may have been started: see `worker-cli list` before running it again"


@frozen(kw_only=True)
class Look:
    """How output is to be shown."""

    json: bool = False
    """Lines of JSON on standard output."""
    visible: bool = False
    """Keep a terminal from acting on it."""
    timestamps: bool = False
    """Begin each line with the time at which its first byte was seen."""
    quiet: bool = False
    """No word of our own about it."""
    ending: bool = False
    """Say how the job ended."""
    losses: Losses = field(factory=Losses)
    """Shared with the connection, or each loss would be told twice."""


async def follow_job(client: "Client", spec: JobSpec, look: Look) -> int:
    """Run a job and print its output to its end: the exit code that tells how it went.

    For a block of `ended_by_interrupt`: Ctrl-C detaches, and the job goes on.
    """
    with asking(MAY_RUN):
        job = await client.run(spec, follow=True)
    detached = (
        f"detached from job {job.id}; it goes on: "
        f"worker-cli log -f {job.id}, worker-cli stop {job.id}"
    )
    with told_at_interrupt("" if look.quiet else detached):
        return shell_exit_code(await print_output(job.output, look, started=job.record))


async def print_output(
    open_output: "OpenOutput", look: Look, *, started: JobRecord | None = None
) -> JobRecord:
    """Print a job's output to its end, over as many connections as it takes: its last record."""
    printer = Printer.make(look)
    if started is not None:
        await printer.start(started)

    with open_output(on_break=None if look.quiet else look.losses.going_on) as output:
        try:
            async for chunk in output:
                printer.take(chunk)
                while printer.has_room and (more := output.receive_nowait()) is not None:
                    printer.take(more)
                await printer.flush()
        finally:
            await printer.finish()
    assert output.record is not None
    await printer.end(output.record)
    return output.record


@define(eq=False)
class Printer:
    """Prints chunks: each stream on its own, or all as lines of JSON."""

    _look: Look
    _outlet: Outlet
    _stampers: dict[Stream, LineStamper]

    @classmethod
    def make(cls, look: Look) -> "Printer":
        """One for this program's own streams."""
        streams = {Stream.STDOUT: sys.stdout, Stream.STDERR: sys.stderr}
        stampers = {stream: LineStamper() for stream in Stream} if look.timestamps else {}
        return cls(look, Outlet(streams, visible=look.visible), stampers)

    async def start(self, job: JobRecord) -> None:
        """Tell of a job that has only just begun."""
        if self._look.json:
            self._event("started", {"job": unstructure(job)})
            await self.flush()

    @property
    def has_room(self) -> bool:
        """Whether it may take more before a flush."""
        return self._outlet.has_room

    def take(self, chunk: "Chunk") -> None:
        """Take a chunk, to be printed with the next flush."""
        if self._look.json:
            self._event("output", _described(chunk))
            return
        data = chunk.data
        if self._look.timestamps:
            data = self._stampers[chunk.stream].feed(data, chunk.time)
        self._outlet.put(chunk.stream, data)

    async def flush(self) -> None:
        """Print what was taken."""
        await self._outlet.flush()

    async def finish(self) -> None:
        """Print what was held back until it was known what follows."""
        for stream in Stream:
            self._outlet.put(stream, b"", final=True)
        await self.flush()

    async def end(self, record: JobRecord) -> None:
        """Say what output and exit code do not tell: what was not kept, and why the job ended."""
        if self._look.json:
            self._event("end", {"job": unstructure(record)})
            await self.flush()
        elif not self._look.quiet:
            for line in (render.ending if self._look.ending else render.losses)(record):
                print_note(line)

    def _event(self, event: str, body: dict[str, object]) -> None:
        line = dumps({"event": event, **body}).encode() + b"\n"
        self._outlet.put(Stream.STDOUT, line)


def _described(chunk: "Chunk") -> dict[str, object]:
    return {
        "stream": chunk.stream.value,
        "offset": chunk.offset,
        "time": unstructure(chunk.time),
        "data": base64.b64encode(chunk.data).decode("ascii"),
    }
