"""A service of an outside launcher that is killed and started again, at one address."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from attrs import define

from jobworker.cli.worker.embedded_service import program
from jobworker.client.client import Client
from jobworker.client.opening import open_client

from ..integration.outside import open_launcher, settings_with
from ..services import write_configuration

CRASHING = str(Path(__file__).with_name("crash_points.py"))


def free_port() -> int:
    """A port that nothing listens on, below those that the kernel gives to connections.

    One of these might have it between the end of a service and the start of the next one:
    ip_local_port_range of ip(7).
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = random.SystemRandom()
    while True:
        port = ports.randrange(first // 2, first)
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


@define(eq=False)
class Site:
    """A directory with a running launcher, and services of it, one at a time."""

    directory: Path
    port: int
    launcher: int
    """The launcher's guard."""
    process: "subprocess.Popen[bytes] | None" = None

    def start(self, *crash_point: str) -> None:
        """Start a service; it is not ready yet. One with a crash point will kill itself there.

        `crash_point`: the point and the name of the job, see `crash_points`.
        """
        worker = [sys.executable, CRASHING, *crash_point] if crash_point else program("worker")
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*worker, "serve", "--config", str(self.directory / "worker.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"},
            )

    async def until_ready(self) -> None:
        """Wait until the port is open."""
        with trio.fail_after(30):
            while True:
                assert self.process is not None
                assert self.process.poll() is None, self.log_text()
                with contextlib.suppress(OSError):
                    await (await trio.open_tcp_stream("127.0.0.1", self.port)).aclose()
                    return
                await trio.sleep(0.02)

    async def until_dead(self) -> None:
        """Wait for the service's end."""
        assert self.process is not None
        with trio.fail_after(30):
            await trio.to_thread.run_sync(self.process.wait)

    async def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        await self.until_dead()

    async def end(self) -> None:
        """Have it end by SIGTERM."""
        assert self.process is not None
        self.process.terminate()
        await self.until_dead()
        assert self.process.returncode == 0, self.log_text()

    @asynccontextmanager
    async def client(self, patience_seconds: float = 120) -> AsyncIterator[Client]:
        """A client that outlives services."""
        certs = self.directory / "certs"
        async with open_client(
            f"127.0.0.1:{self.port}",
            ca=certs / "ca-cert.pem",
            certificate=certs / "admin-client-cert.pem",
            key=certs / "admin-client-key.pem",
            patience_seconds=patience_seconds,
        ) as client:
            yield client

    def log_text(self) -> str:
        """What services have logged."""
        return (self.directory / "log").read_text(errors="replace")


@contextmanager
def open_site(directory: Path, extra: Mapping[str, Mapping[str, object]]) -> Iterator[Site]:
    """A launcher in `directory`; what still runs in the end is ended."""
    with open_launcher(directory, extra) as launcher:
        port = free_port()
        settings = settings_with(directory, extra)
        write_configuration(directory, {**settings, "server": {"port": port}})
        site = Site(directory, port, launcher.pid)
        try:
            yield site
        finally:
            if site.process is not None and site.process.poll() is None:
                site.process.kill()
                site.process.wait()
