"""The commands about jobs' output: log, rm, prune."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial

import asyncclick as click

from jobworker.cli.command_line.failures import print_text
from jobworker.cli.command_line.parameters import Count, JobNumber, Moment, prune_options
from jobworker.cli.worker_cli.connection import open_connection
from jobworker.cli.worker_cli.connection_options import Invocation, json_option, pass_invocation
from jobworker.cli.worker_cli.console import ended_by_interrupt, explain_interrupt, print_error
from jobworker.cli.worker_cli.follow import OutputStyle, print_output
from jobworker.errors import JobworkerError
from jobworker.model.job import Stream
from jobworker.model.units import format_size
from jobworker.protocol.messages import MAX_TAIL_LINES, PruneParams
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

MAY_PRUNE = "output may have been removed: see `worker-cli status JOB` for each job"


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Print new output until the job ends.")
@click.option(
    "--tail",
    "-n",
    type=Count(0, MAX_TAIL_LINES),
    metavar="N",
    help="Only the last N lines, and new lines.",
)
@click.option(
    "--since",
    type=Moment(),
    metavar="TIME|DURATION",
    help="Only lines that began after this time, or in the last DURATION: 10m, "
    "2026-01-31T12:00:00 (local time without a zone such as Z or +02:00).",
)
@click.option("--timestamps", "-t", is_flag=True, help="Begin each line with its time.")
@click.option(
    "--stdout",
    "chosen",
    flag_value=Stream.STDOUT.value,
    multiple=True,
    help="Only standard output (with --stderr, both).",
)
@click.option(
    "--stderr", "chosen", flag_value=Stream.STDERR.value, multiple=True, help="Only standard error."
)
@click.option("--raw", is_flag=True, help="Print exact bytes also on a terminal, which obeys them.")
@json_option()
@click.argument("job", type=JobNumber())
@pass_invocation
async def log(
    invocation: Invocation,
    *,
    job: int,
    follow: bool,
    tail: int | None,
    since: datetime | timedelta | None,
    timestamps: bool,
    chosen: Sequence[str],
    raw: bool,
) -> None:
    """Print the output of JOB, its standard error on standard error.

    On a terminal, control characters are shown, not executed. If the connection breaks, or the
    service stands still, the program reconnects and resumes the output where it stopped. If a job
    writes to standard output and standard error within a short time, the order of the two may
    change; `exec 2>&1` in the job's shell merges them.
    """
    streams = tuple(map(Stream, dict.fromkeys(chosen))) or tuple(Stream)
    style = OutputStyle(json=invocation.json, visible=not raw, timestamps=timestamps)
    async with open_connection(invocation, losses=style.losses) as client:
        output = partial(
            client.job(job).output,
            follow=follow,
            tail_lines=tail,
            since=since,
            streams=streams,
            coalesce=not timestamps,
        )
        await print_output(output, style)


@click.command()
@click.option("--force", is_flag=True, help="Kill a job that has not ended, then remove it.")
@json_option()
@click.argument("jobs", nargs=-1, required=True, type=JobNumber(), metavar="JOB...")
@pass_invocation
async def rm(invocation: Invocation, jobs: tuple[int, ...], force: bool) -> int:
    """Remove each JOB that has ended: its output and its record."""
    code = 0
    async with open_connection(invocation) as client:
        with ended_by_interrupt():
            for job in dict.fromkeys(jobs):
                try:
                    with explain_interrupt(
                        f"job {job} may have been removed: see `worker-cli list`"
                    ):
                        removed = await client.job(job).remove(force=force)
                except JobworkerError as error:
                    print_error(error, json=invocation.json)
                    code = code or error.exit_code
                else:
                    print_text(dumps(unstructure(removed)) if invocation.json else str(job))
    return code


@click.command()
@prune_options
@json_option()
@pass_invocation
async def prune(
    invocation: Invocation, older_than: float | None, keep: int | None, max_size: int | None
) -> None:
    """Remove ended jobs' output, the oldest first; the jobs themselves stay listed.

    Without options, the server applies its configuration. Output that a client follows stays.
    """
    asked = PruneParams(older_than_seconds=older_than, keep_jobs=keep, keep_bytes=max_size)
    async with open_connection(invocation) as client:
        with ended_by_interrupt(), explain_interrupt(MAY_PRUNE):
            removed = await client.prune(asked)
    if invocation.json:
        print_text(dumps(unstructure(removed)))
    else:
        print_text(f"removed the output of {len(removed.jobs)} jobs, {format_size(removed.bytes)}")
