"""The command `list`: a table of the newest jobs that fit, or their records as JSON."""

import sys
from datetime import UTC, datetime
from shutil import get_terminal_size

import asyncclick as click

from jobworker.cli.command_line.failures import print_text
from jobworker.cli.command_line.parameters import Count, LabelFilter, NonEmptyText, all_sought
from jobworker.cli.worker_cli import render
from jobworker.cli.worker_cli.connection import open_connection
from jobworker.cli.worker_cli.connection_options import Invocation, json_option, pass_invocation
from jobworker.model.job import JobRecord
from jobworker.model.lifecycle import State
from jobworker.protocol.messages import MAX_LIST
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps


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
            datetime.now(UTC),
            width=get_terminal_size().columns if terminal else None,
            colour=terminal and _wants_colour(),
        )
    )


def _wants_colour() -> bool:
    import os

    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
