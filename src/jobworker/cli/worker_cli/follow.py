"""Print a job's output on this program's own streams, as it comes, across lost connections."""

import base64
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from attrs import define, field, frozen

from jobworker.cli.command_line.failures import print_note
from jobworker.cli.worker_cli import render
from jobworker.cli.worker_cli.console import (
    LossReporter,
    OutputWriter,
    explain_interrupt,
    print_at_interrupt,
)
from jobworker.cli.worker_cli.control_characters import LineStamper
from jobworker.model.job import JobRecord, JobSpec, Stream, shell_exit_code
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

if TYPE_CHECKING:
    from jobworker.client.client import Client
    from jobworker.client.following import Chunk
    from jobworker.client.job import JobOutput

    OpenOutput = Callable[..., JobOutput]
    """`Job.output`, with arguments that select a part of the output."""


MAY_RUN = "the job may have been started: see `worker-cli list` before running it again"


@frozen(kw_only=True)
class OutputStyle:
    """How output is printed."""

    json: bool = False
    """Print lines of JSON on standard output."""
    visible: bool = False
    """Show control bytes on a terminal, instead of sending them to it."""
    timestamps: bool = False
    """Begin each line with the time at which the service read its first byte."""
    quiet: bool = False
    """Print the job's output only, no lines of this program."""
    ending: bool = False
    """Print how the job ended."""
    losses: LossReporter = field(factory=LossReporter)
    """Shared with the connection, or each loss would be printed twice."""


async def follow_job(client: "Client", spec: JobSpec, style: OutputStyle) -> int:
    """Run a job, print its output to its end, and return the job's shell exit code.

    Call it inside a block of `ended_by_interrupt`: Ctrl-C detaches, and the job goes on.
    """
    with explain_interrupt(MAY_RUN):
        job = await client.run(spec, follow=True)
    detached = (
        f"detached from job {job.id}; it goes on: "
        f"worker-cli log -f {job.id}, worker-cli stop {job.id}"
    )
    with print_at_interrupt("" if style.quiet else detached):
        return shell_exit_code(await print_output(job.output, style, started=job.record))


async def print_output(
    open_output: "OpenOutput", style: OutputStyle, *, started: JobRecord | None = None
) -> JobRecord:
    """Print a job's output to its end, and return the job's last record.

    If the connection is lost, the client makes a new one and the output resumes.
    """
    printer = Printer.make(style)
    if started is not None:
        await printer.start(started)

    with open_output(on_break=None if style.quiet else style.losses.report_resume) as output:
        try:
            async for chunk in output:
                printer.add(chunk)
                while printer.has_room and (more := output.receive_nowait()) is not None:
                    printer.add(more)
                await printer.flush()
        finally:
            await printer.finish()
    assert output.record is not None
    await printer.end(output.record)
    return output.record


@define(eq=False)
class Printer:
    """Prints chunks: each stream on its own, or all as lines of JSON."""

    _style: OutputStyle
    _writer: OutputWriter
    _stampers: dict[Stream, LineStamper]

    @classmethod
    def make(cls, style: OutputStyle) -> "Printer":
        """Make a printer for this program's own streams."""
        streams = {Stream.STDOUT: sys.stdout, Stream.STDERR: sys.stderr}
        stampers = {stream: LineStamper() for stream in Stream} if style.timestamps else {}
        return cls(style, OutputWriter(streams, visible=style.visible), stampers)

    async def start(self, job: JobRecord) -> None:
        """With JSON, print that the job has started."""
        if self._style.json:
            self._event("started", {"job": unstructure(job)})
            await self.flush()

    @property
    def has_room(self) -> bool:
        """Whether the caller may pass more chunks before it flushes."""
        return self._writer.has_room

    def add(self, chunk: "Chunk") -> None:
        """Add a chunk, to be printed with the next flush."""
        if self._style.json:
            self._event("output", _described(chunk))
            return
        data = chunk.data
        if self._style.timestamps:
            data = self._stampers[chunk.stream].feed(data, chunk.time)
        self._writer.put(chunk.stream, data)

    async def flush(self) -> None:
        """Print the chunks that were added."""
        await self._writer.flush()

    async def finish(self) -> None:
        """Print bytes that the filter holds back until it sees the next ones; none follow."""
        for stream in Stream:
            self._writer.put(stream, b"", final=True)
        await self.flush()

    async def end(self, record: JobRecord) -> None:
        """Print what the output does not show: lost output and, if asked, why the job ended."""
        if self._style.json:
            self._event("end", {"job": unstructure(record)})
            await self.flush()
        elif not self._style.quiet:
            for line in (render.ending if self._style.ending else render.losses)(record):
                print_note(line)

    def _event(self, event: str, body: dict[str, object]) -> None:
        line = dumps({"event": event, **body}).encode() + b"\n"
        self._writer.put(Stream.STDOUT, line)


def _described(chunk: "Chunk") -> dict[str, object]:
    return {
        "stream": chunk.stream.value,
        "offset": chunk.offset,
        "time": unstructure(chunk.time),
        "data": base64.b64encode(chunk.data).decode("ascii"),
    }
