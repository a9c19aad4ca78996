"""The commands about jobs: run, status, stop, list, wait.

Each opens one connection, makes its calls and prints. Faults that need no server to find (a
malformed option, an argument that is no text) are refused before the program connects.
"""

import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from functools import partial
from shutil import get_terminal_size
from typing import TYPE_CHECKING, TypeVar, get_args

import asyncclick as click
import trio

from jobworker.cli.command_line.failures import print_note, print_text
from jobworker.cli.command_line.parameters import (
    Count,
    Duration,
    JobNumber,
    LabelFilter,
    Megabytes,
    NonEmptyText,
    Percent,
    Size,
    Text,
    all_sought,
)
from jobworker.cli.worker_cli import render
from jobworker.cli.worker_cli.connection_options import Invocation, json_option, pass_invocation
from jobworker.cli.worker_cli.console import (
    LossReporter,
    ended_by_interrupt,
    explain_interrupt,
    print_error,
)
from jobworker.cli.worker_cli.follow import MAY_RUN, OutputStyle, follow_job
from jobworker.cli.worker_cli.job_options import job_options
from jobworker.cli.worker_cli.render_plan import render_plan
from jobworker.cli.worker_cli.request import in_options, make_spec
from jobworker.errors import InvalidParams, JobworkerError
from jobworker.model.job import JobRecord, JobSpec, JobStatus, OutputPolicy, shell_exit_code
from jobworker.model.lifecycle import State
from jobworker.protocol.messages import MAX_LIST
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

if TYPE_CHECKING:
    from jobworker.client.client import Client

Record = TypeVar("Record", bound=JobRecord)

CALLS_AT_A_TIME = 64
"""Well below the number of requests that a server allows in flight on one connection."""


def open_connection(
    invocation: Invocation,
    *,
    patient: bool = True,
    quiet: bool = False,
    losses: LossReporter | None = None,
) -> "AbstractAsyncContextManager[Client]":
    """Connect to the server that options, environment or configuration file name.

    If the server does not answer, for example during a restart, the client tries again: for
    WORKER_PATIENCE at the first connection, for its own `PATIENCE_SECONDS` at later ones. With
    `patient=False` it does not. `quiet` prints no line about a lost connection. A line about the
    first connection goes to a terminal only, because its failure is printed in any case. `losses`
    is the reporter that a printer of output also uses.
    """
    from jobworker.client.calls import PATIENCE_SECONDS
    from jobworker.client.opening import open_client

    target = invocation.target()
    report_lost = (losses or LossReporter()).report_reconnect
    return open_client(
        target.address,
        ca=target.ca,
        certificate=target.certificate,
        key=target.key,
        patience_seconds=PATIENCE_SECONDS if patient else 0,
        start_patience_seconds=target.start_patience_seconds if patient else 0,
        on_lost=None if quiet else report_lost,
        on_refused=report_lost if sys.stderr is not None and sys.stderr.isatty() else None,
    )


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--max-cpu", type=Percent(), metavar="PERCENT", help="CPU limit: 200 is two cores.")
@click.option(
    "--max-memory",
    type=Megabytes(),
    metavar="SIZE",
    help="Memory limit, swap included: 64M, 2G; a number alone is MB of 2^20 bytes.",
)
@click.option(
    "--max-iobps",
    type=Size(),
    metavar="SIZE",
    help="Disk limit per second: 500K, 10M; a number alone is bytes.",
)
@click.option(
    "--max-disk",
    type=Megabytes(),
    metavar="SIZE",
    help="Size of the disk that the job writes to: 64M, 2G; a number alone is MB.",
)
@click.option("--max-pids", type=int, metavar="N", help="Limit on processes and threads.")
@click.option(
    "--max-output",
    type=Size(),
    metavar="SIZE",
    help="Limit on kept output: 500K, 64M, 2G; a number alone is bytes.",
)
@click.option(
    "--at-max-output",
    type=click.Choice(get_args(OutputPolicy)),
    help="At the limit on output: drop further output, or stop the job.",
)
@click.option("--timeout", type=Duration(), help="Longest run time: 90s, 10m, 1h30m; 0 is none.")
@click.option("--workdir", "-w", type=NonEmptyText(), metavar="PATH", help="Directory to start in.")
@click.option("--name", type=NonEmptyText(), help="A name for the job; `list --name` finds it.")
@click.option("--follow", "-f", is_flag=True, help="Print its output, exit with its code.")
@click.option("--quiet", "-q", is_flag=True, help="Print the job's id only.")
@click.option("--raw", is_flag=True, help="With -f: print exact bytes also on a terminal.")
@click.option("--dry-run", is_flag=True, help="Print limits and steps of the start; run nothing.")
@json_option()
@click.argument("command", nargs=-1, required=True, type=Text(), metavar="COMMAND [ARG]...")
@pass_invocation
@job_options
async def run(  # noqa: PLR0913 - each option is an argument
    invocation: Invocation,
    *,
    command: tuple[str, ...],
    max_cpu: int | None,
    max_memory: int | None,
    max_iobps: int | None,
    max_disk: int | None,
    max_pids: int | None,
    max_output: int | None,
    at_max_output: str | None,
    timeout: float | None,  # noqa: ASYNC109 - the job's, not this function's
    fields: Mapping[str, object],
    workdir: str | None,
    name: str | None,
    follow: bool,
    quiet: bool,
    raw: bool,
    dry_run: bool,
) -> int:
    """Run COMMAND as a job. Everything after COMMAND belongs to it, options included.

    With --follow, Ctrl-C detaches and the job goes on. On a terminal, control characters of the
    output are shown, not executed. A limit of 0 means no limit. If a job writes to standard output
    and standard error within a short time, the order of the two may change; `exec 2>&1` in the
    job's shell merges them.
    """
    spec = make_spec(
        command,
        limits={
            "cpu_percent": max_cpu,
            "memory_bytes": max_memory,
            "io_bps": max_iobps,
            "processes": max_pids,
            "disk_bytes": max_disk,
            "output_bytes": max_output,
        },
        timeout_seconds=timeout,
        at_max_output=at_max_output,
        **fields,
        workdir=workdir,
        name=name,
    )
    style = OutputStyle(json=invocation.json, quiet=quiet, ending=True, visible=not raw)
    try:
        async with open_connection(invocation, quiet=quiet, losses=style.losses) as client:
            if dry_run:
                plan = await client.plan(spec)
                print_text(dumps(unstructure(plan)) if invocation.json else render_plan(plan))
                return 0
            with ended_by_interrupt():
                if follow:
                    return await follow_job(client, spec, style)
                return await _run_only(client, spec, json=invocation.json, quiet=quiet)
    except InvalidParams as error:
        raise in_options(error) from None


async def _run_only(client: "Client", spec: JobSpec, *, json: bool, quiet: bool) -> int:
    with explain_interrupt(MAY_RUN):
        job = (await client.run(spec)).record
    assert job is not None
    if json:
        print_text(render.as_json(job))
    else:
        print_text(str(job.id) if quiet else render.started(job))
    return 0


@click.command()
@json_option()
@click.argument("jobs", nargs=-1, required=True, type=JobNumber(), metavar="JOB...")
@pass_invocation
async def status(invocation: Invocation, jobs: tuple[int, ...]) -> int:
    """Show the state, limits, usage and times of each JOB."""
    apart = "\n" * (len(jobs) > 1)

    def show(record: JobStatus) -> str:
        return render.status(record, _now()) + apart

    async with open_connection(invocation) as client:
        _, failed = await _each(
            jobs, lambda job: client.job(job).status(), show, json=invocation.json
        )
    return failed


@click.command()
@click.option(
    "--signal",
    type=NonEmptyText(),
    default="TERM",
    show_default=True,
    help="The signal to send first.",
)
@click.option("--grace", type=Duration(), help="Time between this signal and SIGKILL.")
@json_option()
@click.argument("jobs", nargs=-1, required=True, type=JobNumber(), metavar="JOB...")
@pass_invocation
async def stop(
    invocation: Invocation, jobs: tuple[int, ...], signal: str, grace: float | None
) -> int:
    """Stop each JOB and wait for its end: a signal, a grace period, SIGKILL for all its processes.

    Ctrl-C ends the wait; the server goes on with the stop.
    """
    asked = dict.fromkeys(jobs, False)
    """Each job without an outcome: whether the server may have received the request to stop it."""

    async def stop_one(job: int) -> JobRecord:
        try:
            record = await client.job(job).stop(
                signal=signal, grace_seconds=grace, on_asked=partial(asked.__setitem__, job)
            )
        except JobworkerError:
            del asked[job]
            raise
        del asked[job]
        return record

    async with open_connection(invocation) as client:
        with ended_by_interrupt():
            try:
                _, failed = await _each(jobs, stop_one, render.outcome, json=invocation.json)
            finally:
                _print_unfinished_stops(asked)
    return failed


def _print_unfinished_stops(asked: Mapping[int, bool]) -> None:
    """After Ctrl-C, print which jobs the server still stops, and which it was not asked to stop."""
    if names := " ".join(str(job) for job, may_be_asked in asked.items() if may_be_asked):
        print_note(f"the server goes on with the stop: worker-cli wait {names}")
    if names := " ".join(str(job) for job, may_be_asked in asked.items() if not may_be_asked):
        print_note(f"not asked to stop: {names}")


@click.command()
@json_option()
@click.argument("jobs", nargs=-1, required=True, type=JobNumber(), metavar="JOB...")
@pass_invocation
async def wait(invocation: Invocation, jobs: tuple[int, ...]) -> int:
    """Wait for the end of each JOB; exit with the code of the last one."""
    async with open_connection(invocation) as client:
        last, failed = await _each(
            jobs, lambda job: client.job(job).wait(), render.outcome, json=invocation.json
        )
    return failed if failed or last is None else shell_exit_code(last)


async def _each(
    jobs: Sequence[int],
    call: Callable[[int], Awaitable[Record]],
    show: Callable[[Record], str],
    *,
    json: bool,
) -> tuple[Record | None, int]:
    """Call for all jobs at once, and print the outcomes in the order of `jobs`.

    Returns the last record and the exit code of the first error. At Ctrl-C, the outcomes that have
    arrived are printed.
    """
    outcomes: dict[int, Record | JobworkerError] = {}
    ended = {job: trio.Event() for job in jobs}
    limiter = trio.CapacityLimiter(CALLS_AT_A_TIME)

    async def call_one(job: int) -> None:
        async with limiter:
            try:
                outcomes[job] = await call(job)
            except JobworkerError as error:
                outcomes[job] = error
        ended[job].set()

    last: Record | None = None
    code = 0

    def show_outcome(job: int) -> None:
        nonlocal last, code
        outcome = outcomes[job]
        if isinstance(outcome, JobworkerError):
            print_error(outcome, json=json)
            code = code or outcome.exit_code
        else:
            last = outcome
            print_text(render.as_json(outcome) if json else show(outcome))

    rest = deque(jobs)
    async with trio.open_nursery() as nursery:
        for job in ended:
            nursery.start_soon(call_one, job)
        try:
            while rest:
                await ended[rest[0]].wait()
                show_outcome(rest.popleft())
        except (trio.Cancelled, KeyboardInterrupt):
            for job in rest:
                if job in outcomes:
                    show_outcome(job)
            raise
    return last, code


@click.command("list")
@click.option(
    "--status",
    "states",
    multiple=True,
    metavar="STATE",
    type=click.Choice([state.value for state in State], case_sensitive=False),
    help="Only jobs in this state; may be repeated.",
)
@click.option(
    "--label",
    "-l",
    "labels",
    multiple=True,
    type=LabelFilter(),
    callback=all_sought,
    metavar="NAME=VALUE",
    help="Only jobs with this label; may be repeated, for jobs that have all of them.",
)
@click.option("--name", type=NonEmptyText(), help="Only jobs of this name.")
@click.option(
    "--limit",
    type=Count(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="At most N jobs, the newest.",
)
@json_option()
@pass_invocation
async def list_jobs(
    invocation: Invocation,
    states: tuple[str, ...],
    labels: dict[str, str],
    name: str | None,
    limit: int,
) -> None:
    """List jobs, newest first. Long commands are cut; `status` shows all of a job."""
    chosen = [State(state) for state in states]
    found: list[JobRecord] = []
    async with open_connection(invocation) as client:
        while len(found) < limit:
            asked = min(limit - len(found), MAX_LIST)
            before = found[-1].id if found else None
            page = await client.list(
                states=chosen, labels=labels, name=name or "", limit=asked, before=before
            )
            found.extend(page)
            if not page:  # a short page is not the last: the server also bounds a page's bytes
                break
    if invocation.json:
        print_text(dumps(unstructure(found)))
        return
    terminal = sys.stdout is not None and sys.stdout.isatty()
    print_text(
        render.table(
            found,
            _now(),
            width=get_terminal_size().columns if terminal else None,
            colour=terminal and _wants_colour(),
        )
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _wants_colour() -> bool:
    import os

    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
