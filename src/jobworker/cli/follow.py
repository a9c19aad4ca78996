"""A job's output on this program's own streams, as it comes."""

import base64
import sys
from typing import TYPE_CHECKING

from jobworker.cli import render
from jobworker.cli.console import Sink, cancelled_by_interrupt, note
from jobworker.cli.failures import INTERRUPTED
from jobworker.convert import dumps, unstructure
from jobworker.model.job import JobRecord, JobSpec, Stream, shell_exit_code

if TYPE_CHECKING:
    from jobworker.client.client import Client
    from jobworker.client.following import Chunk, Following


async def follow_job(client: "Client", spec: JobSpec, *, json: bool, quiet: bool) -> int:
    """Run a job and print its output to its end: the exit code that tells how it went.

    Ctrl-C detaches: the job goes on.
    """
    job: JobRecord | None = None
    record: JobRecord | None = None
    with cancelled_by_interrupt(), await client.run(spec, follow=True) as output:
        job = output.job
        record = await stream_output(output, json=json, visible=False)
    if record is not None:
        if not (json or quiet):
            for line in render.ending(record):
                note(line)
        return shell_exit_code(record)
    if job is not None and not quiet:
        note(
            f"detached from job {job.id}; it goes on: "
            f"worker-cli log -f {job.id}, worker-cli stop {job.id}"
        )
    return INTERRUPTED


async def stream_output(output: "Following", *, json: bool, visible: bool) -> JobRecord | None:
    """Print chunks as they come: each stream on its own, or all as lines of JSON.

    `visible` keeps a terminal from acting on them. Answers the job's record at the end.
    """
    stdout = Sink(sys.stdout, visible=visible)
    if json:
        if output.job is not None:
            await stdout.write(_line("started", {"job": unstructure(output.job)}))
        async for chunk in output:
            await stdout.write(_line("output", _described(chunk)))
        await stdout.write(_line("end", {"job": unstructure(output.record)}))
        return output.record
    sinks = {Stream.STDOUT: stdout, Stream.STDERR: Sink(sys.stderr, visible=visible)}
    async for chunk in output:
        await sinks[chunk.stream].write(chunk.data)
    return output.record


def _line(event: str, body: dict[str, object]) -> bytes:
    return dumps({"event": event, **body}).encode() + b"\n"


def _described(chunk: "Chunk") -> dict[str, object]:
    return {
        "stream": chunk.stream.value,
        "offset": chunk.offset,
        "time": unstructure(chunk.time),
        "data": base64.b64encode(chunk.data).decode("ascii"),
    }
