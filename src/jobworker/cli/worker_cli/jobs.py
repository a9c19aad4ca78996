"""The commands about jobs that the user names: status, stop, wait.

Each makes one call for each job, all over one connection, and prints the outcomes in the order of
the jobs.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import asyncclick as click
import trio

from jobworker.cli.command_line.failures import print_note, print_text
from jobworker.cli.command_line.parameters import Duration, JobNumber, NonEmptyText
from jobworker.cli.worker_cli import render
from jobworker.cli.worker_cli.connection import open_connection
from jobworker.cli.worker_cli.connection_options import Invocation, json_option, pass_invocation
from jobworker.cli.worker_cli.console import ended_by_interrupt, print_error
from jobworker.errors import JobworkerError
from jobworker.model.job import JobRecord, JobStatus, shell_exit_code

Record = TypeVar("Record", bound=JobRecord)

CALLS_AT_A_TIME = 64
"""Well below the number of requests that a server allows in flight on one connection."""


@click.command()
@json_option()
@click.argument("jobs", nargs=-1, required=True, type=JobNumber(), metavar="JOB...")
@pass_invocation
async def status(invocation: Invocation, jobs: tuple[int, ...]) -> int:
    """Show the state, limits, usage and times of each JOB."""
    apart = "\n" * (len(jobs) > 1)

    def show(record: JobStatus) -> str:
        return render.status(record, datetime.now(UTC)) + apart

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
