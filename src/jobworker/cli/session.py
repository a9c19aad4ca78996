"""`whoami` and `ping`: who the server takes us for, and how fast it answers."""

import time

import asyncclick as click

from jobworker.cli.console import say
from jobworker.cli.failures import one_line
from jobworker.cli.jobs import open_connection
from jobworker.cli.options import Invocation
from jobworker.cli.parameters import Count, json_option, pass_invocation
from jobworker.convert import unstructure
from jobworker.json_text import dumps


@click.command()
@json_option()
@pass_invocation
async def whoami(invocation: Invocation) -> None:
    """Tell our name and role, as the server takes them from our certificate."""
    async with open_connection(invocation) as client:
        welcome = await client.hello()
    if invocation.json:
        say(dumps({**unstructure(welcome), "server": str(invocation.target().address)}))
        return
    say(f"Name: {one_line(welcome.name)}")
    say(f"Role: {one_line(welcome.role)}")
    say(f"Server: {invocation.target().address} (jobworker {one_line(welcome.version)})")


@click.command()
@click.option(
    "--count",
    "-c",
    type=Count(min=1, max=1_000_000),
    default=1,
    show_default=True,
    metavar="N",
    help="How many times.",
)
@json_option()
@pass_invocation
async def ping(invocation: Invocation, count: int) -> None:
    """Tell how long the server takes to be reached, and to answer a request."""
    began = time.perf_counter()
    async with open_connection(invocation, patient=False) as client:
        connected = time.perf_counter() - began
        address = str(invocation.target().address)
        if not invocation.json:
            say(f"connected to {address} in {connected * 1000:.1f} ms")
        for number in range(1, count + 1):
            began = time.perf_counter()
            await client.hello()
            taken = time.perf_counter() - began
            if invocation.json:
                say(dumps({"server": address, "number": number, "seconds": round(taken, 6)}))
            else:
                say(f"answer {number} in {taken * 1000:.1f} ms")
