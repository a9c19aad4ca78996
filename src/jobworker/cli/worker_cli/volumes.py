"""The commands about volumes: create, list, rm."""

import asyncclick as click

from jobworker.cli.command_line.failures import print_text
from jobworker.cli.command_line.parameters import Megabytes, Text
from jobworker.cli.worker_cli.connection import open_connection
from jobworker.cli.worker_cli.connection_options import Invocation, json_option, pass_invocation
from jobworker.cli.worker_cli.console import ended_by_interrupt, explain_interrupt, print_error
from jobworker.errors import InvalidParams, JobworkerError
from jobworker.model.units import format_limit, format_size
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES, name_fault

SEE_LIST = "see `worker-cli volume list`"


@click.group()
def volume() -> None:
    """Manage volumes: directories of a fixed size that outlive jobs (`run --volume NAME`)."""


@volume.command()
@click.option(
    "--size",
    type=Megabytes(),
    metavar="SIZE",
    required=True,
    help="Size of the volume: 100M, 10G; a number alone is MB of 2^20 bytes.",
)
@click.option("--thin", is_flag=True, help="Do not reserve the size on the server's disk.")
@json_option()
@click.argument("name", type=Text())
@pass_invocation
async def create(invocation: Invocation, name: str, size: int, thin: bool) -> None:
    """Create the volume NAME.

    The server reserves its size on the disk. With --thin it does not; if the disk is full, a job
    that writes to the volume loses its data and FAILs. In both cases, the size must fit into the
    free space of the disk. An empty thin volume takes the space of its file system's own tables,
    for example 257 MiB of 60 GiB.
    """
    _check_name("create", name)
    if not MIN_DISK_BYTES <= size <= MAX_DISK_BYTES:
        bounds = f"{format_limit(MIN_DISK_BYTES)} to {format_limit(MAX_DISK_BYTES)}"
        fault = f"--size must be from {bounds}, not {format_limit(size)}"
        raise InvalidParams(f"cannot create the volume {name}: {fault}")
    async with open_connection(invocation) as client:
        with (
            ended_by_interrupt(),
            explain_interrupt(f"the volume {name} may have been made: {SEE_LIST}"),
        ):
            await client.make_volume(name, size, thin=thin)
    if invocation.json:
        print_text(dumps({"name": name, "size_bytes": size, "thin": thin}))


@volume.command(name="list")
@json_option()
@pass_invocation
async def list_volumes(invocation: Invocation) -> None:
    """List all volumes."""
    async with open_connection(invocation) as client:
        found = await client.volumes()
    if invocation.json:
        print_text(dumps(unstructure(found)))
        return
    rows = [("NAME", "SIZE", "ON DISK", "JOBS", "KIND")]
    for each in found:
        sizes = (format_limit(each.size_bytes), format_size(each.used_bytes))
        rows.append((each.name, *sizes, str(each.jobs), "thin" if each.thin else "reserved"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print_text("  ".join(map(str.ljust, row, widths)).rstrip())


@volume.command()
@json_option()
@click.argument("names", nargs=-1, required=True, type=Text(), metavar="NAME...")
@pass_invocation
async def rm(invocation: Invocation, names: tuple[str, ...]) -> int:
    """Remove volumes with all their files. If one cannot be removed, the others still are."""
    code = 0
    for name in names:
        _check_name("remove", name)
    async with open_connection(invocation) as client:
        with ended_by_interrupt():
            for name in dict.fromkeys(names):
                try:
                    with explain_interrupt(f"the volume {name} may have been removed: {SEE_LIST}"):
                        await client.remove_volume(name)
                except JobworkerError as error:
                    print_error(error, json=invocation.json)
                    code = code or error.exit_code
                else:
                    if invocation.json:
                        print_text(dumps({"name": name}))
    return code


def _check_name(what: str, name: str) -> None:
    if fault := name_fault(name):
        raise InvalidParams(f"cannot {what} the volume: {fault}")
