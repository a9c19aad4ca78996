"""The command `run`: starts a job, and follows it or prints its id.

A fault that needs no server to find, such as a malformed option, is refused before the program
connects.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

import asyncclick as click

from jobworker.cli.command_line.failures import print_text
from jobworker.cli.command_line.parameters import (
    Duration,
    Megabytes,
    NonEmptyText,
    Percent,
    Size,
    Text,
)
from jobworker.cli.worker_cli import render
from jobworker.cli.worker_cli.connection import open_connection
from jobworker.cli.worker_cli.connection_options import Invocation, json_option, pass_invocation
from jobworker.cli.worker_cli.console import ended_by_interrupt, explain_interrupt
from jobworker.cli.worker_cli.follow import MAY_RUN, OutputStyle, follow_job
from jobworker.cli.worker_cli.job_options import job_options
from jobworker.cli.worker_cli.render_plan import render_plan
from jobworker.cli.worker_cli.request import in_options, make_spec
from jobworker.errors import InvalidParams
from jobworker.model.job import JobSpec, OutputPolicy
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

if TYPE_CHECKING:
    from jobworker.client.client import Client


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
