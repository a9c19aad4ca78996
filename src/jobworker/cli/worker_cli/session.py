"""`whoami` and `ping`: the name and role that the server sees, and how fast it answers."""

import time

import asyncclick as click

from jobworker.cli.command_line.failures import one_line, print_text
from jobworker.cli.command_line.parameters import Count
from jobworker.cli.worker_cli.connection import open_connection
from jobworker.cli.worker_cli.connection_options import Invocation, json_option, pass_invocation
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps


@click.command()
@json_option()
@pass_invocation
async def whoami(invocation: Invocation) -> None:
    """Show your name and role, which the server reads from your certificate."""
    async with open_connection(invocation) as client:
        welcome = await client.hello()
    if invocation.json:
        print_text(dumps({**unstructure(welcome), "server": str(invocation.target().address)}))
        return
    print_text(f"Name: {one_line(welcome.name)}")
    print_text(f"Role: {one_line(welcome.role)}")
    print_text(f"Server: {invocation.target().address} (jobworker {one_line(welcome.version)})")


@click.command()
@click.option(
    "--count",
    "-c",
    type=Count(min=1, max=1_000_000),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of requests.",
)
@json_option()
@pass_invocation
async def ping(invocation: Invocation, count: int) -> None:
    """Measure how long it takes to connect to the server, and to get a reply."""
    began = time.perf_counter()
    async with open_connection(invocation, patient=False) as client:
        connected = time.perf_counter() - began
        address = str(invocation.target().address)
        if not invocation.json:
            print_text(f"connected to {address} in {connected * 1000:.1f} ms")
        for number in range(1, count + 1):
            began = time.perf_counter()
            await client.hello()
            taken = time.perf_counter() - began
            if invocation.json:
                print_text(dumps({"server": address, "number": number, "seconds": round(taken, 6)}))
            else:
                print_text(f"answer {number} in {taken * 1000:.1f} ms")
