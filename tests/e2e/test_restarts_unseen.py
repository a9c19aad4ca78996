"""Restarts of the service that the command line does not see: each command does what it promises.

The service ends four times (eight with JOBWORKER_SOAK set), by SIGTERM and by SIGKILL in turn,
while commands of every kind run, and some start while nothing listens.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import pytest
import trio
from attrs import Factory, define

from jobworker.cli.worker.embedded_service import program

from ..integration.conftest import _needs_root, left_behind, open_directory
from ..integration.test_foreign_clients import COMMANDS, missing
from .restarting import Site, open_site

__all__ = ["_needs_root", "open_directory"]

CLI = program("worker-cli")
RESTARTS = 8 if os.environ.get("JOBWORKER_SOAK") else 4
WRITER = """
trap 'end=1' TERM
i=0
while [ -z "$end" ]; do
    echo "o $i"; echo "e $i" >&2; i=$((i+1))
    sleep 0.01
done
echo "end $i"; echo "end $i" >&2
exit 7
"""
STUBBORN = "trap '' TERM; echo up; while :; do sleep 0.1; done"


@define(eq=False)
class Command:
    """A run of worker-cli: its process, and the files that its output goes to."""

    process: "subprocess.Popen[bytes]"
    out: Path
    err: Path

    async def ended(self) -> int:
        """Wait for its end: the exit code."""
        with trio.fail_after(120):
            return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)


@define(eq=False)
class Commands:
    """Starts worker-cli against the service of a site."""

    site: Site
    count: int = 0
    started: list[Command] = Factory(list)
    enough: bool = False
    """Whether `ask_all_the_time` has asked often enough."""

    def start(self, *arguments: str, program: Sequence[str] = CLI) -> Command:
        """Start a command, of worker-cli or another client."""
        self.count += 1
        out, err = (self.site.directory / f"{self.count}.{name}" for name in ("out", "err"))
        certs = self.site.directory / "certs"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [*program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={
                    **os.environ,
                    "WORKER_SERVER": f"127.0.0.1:{self.site.port}",
                    "WORKER_CERT_PATH": str(certs / "admin-client-cert.pem"),
                    "WORKER_KEY_PATH": str(certs / "admin-client-key.pem"),
                    "WORKER_CA_PATH": str(certs / "ca-cert.pem"),
                    "WORKER_PATIENCE": "60s",
                },
            )
        self.started.append(Command(process, out, err))
        return self.started[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for command in self.started:  # where a test fails, they might wait for ever
            command.process.kill()
            command.process.wait()

    async def run(self, *arguments: str) -> str:
        """Run a command to its good end: what it prints."""
        command = self.start(*arguments)
        assert await command.ended() == 0, command.err.read_text()
        return command.out.read_text()


def check(text: str, letter: str) -> None:
    """Every line is there, once and in order."""
    *lines, end = text.splitlines()
    assert lines == [f"{letter} {number}" for number in range(len(lines))]
    assert end == f"end {len(lines)}"


def without_notes(text: str) -> str:
    """What a job wrote on its standard error, less what worker-cli has to say itself."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("worker-cli: ", "job ")))


async def ask_all_the_time(commands: Commands, job: str) -> None:
    """Have `status` and `list` answered at any moment."""
    while not commands.enough:
        assert "RUNNING" in await commands.run("status", job)
        assert await commands.run("list", "--limit=2")
        await trio.sleep(0.3)  # each loads Python, and would take a processor from all others


@pytest.mark.timeout(300)
async def test_commands_go_on_over_restarts(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    extra: dict[str, dict[str, object]] = {"sandbox": {"disk_limit": 16}}
    with open_site(directory, extra) as site, Commands(site) as commands:
        site.start()
        await site.until_ready()
        job = (await commands.run("run", "-q", "sh", "-c", WRITER)).strip()
        victims = [
            (await commands.run("run", "-q", "sh", "-c", STUBBORN)).strip() for _ in range(RESTARTS)
        ]
        log = commands.start("log", "-f", job)
        run = commands.start("run", "-f", "--name=followed", "sh", "-c", WRITER)
        wait = commands.start("wait", job)
        await until_written(log.out, run.out)
        stops = []
        async with trio.open_nursery() as asking:
            asking.start_soon(ask_all_the_time, commands, job)
            for number, victim in enumerate(victims):
                before = log.out.stat().st_size
                stops.append(commands.start("stop", "--grace=500ms", victim))
                await (site.kill() if number % 2 else site.end())
                site.start()
                await site.until_ready()
                await until_longer(log.out, before)  # it goes on after each
            commands.enough = True
        for stop in stops:
            assert await stop.ended() == 0, stop.err.read_text()
        for victim in victims:
            assert "STOPPED" in await commands.run("status", victim)
        (followed,) = json.loads(await commands.run("list", "--json", "--limit=1"))
        assert followed["spec"]["name"] == "followed"
        await commands.run("stop", job, str(followed["id"]))
        assert await log.ended() == 0, log.err.read_text()
        assert await wait.ended() == 7, wait.err.read_text()
        assert await run.ended() == 7, run.err.read_text()
        for command in (log, run):
            check(command.out.read_text(), "o")
            check(without_notes(command.err.read_text()), "e")
        await site.end()
    assert left_behind(directory) == []


async def until_written(*files: Path) -> None:
    for file in files:
        await until_longer(file, 0)


async def until_longer(file: Path, size: int) -> None:
    with trio.fail_after(60):
        while file.stat().st_size <= size:  # noqa: ASYNC110
            await trio.sleep(0.02)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", COMMANDS)
async def test_foreign_client_goes_on_over_restarts(
    open_directory: Callable[[], Path], name: str
) -> None:
    if lacking := missing(name):
        pytest.skip(f"needs {lacking}")
    directory = open_directory()
    extra: dict[str, dict[str, object]] = {"sandbox": {"disk_limit": 16}}
    with open_site(directory, extra) as site, Commands(site) as commands:
        site.start()
        await site.until_ready()
        slowly = WRITER.replace("sleep 0.01", "sleep 0.3")  # one in shell starts many processes
        client = commands.start("sh", "-c", slowly, program=COMMANDS[name])
        await until_written(client.out)
        for end in (site.end, site.kill):
            before = client.out.stat().st_size
            await end()
            site.start()
            await site.until_ready()
            await until_longer(client.out, before)
        client.process.send_signal(signal.SIGINT)  # which stops the job
        assert await client.ended() == 7, client.err.read_text()
        check(client.out.read_text(), "o")
        check(without_notes(client.err.read_text()), "e")
        await site.end()
    assert left_behind(directory) == []
