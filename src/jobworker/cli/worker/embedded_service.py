"""Run a private service for a block: its own certificates, configuration, process and port.

`worker demo` and the tests use it. It is the real `worker serve`, in a process of its own, on a
free loopback port, with a free range of user ids.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import trio
from attrs import frozen

from jobworker.cli.worker import guard
from jobworker.errors import HostUnsupported
from jobworker.pki.administration import init_authority
from jobworker.serialization.json_text import dumps
from jobworker.server.reporting.notify import ADDRESS_FIELD

START_SECONDS = 120  # for an emulated machine; a service that fails ends the wait at once
END_SECONDS = 30


@frozen(kw_only=True)
class EmbeddedService:
    """A running service."""

    address: str
    """HOST:PORT."""
    directory: Path
    """Holds certs/, state/, worker.toml and log."""
    process: trio.Process

    def environment(self, role: str = "admin") -> dict[str, str]:
        """The variables with which `worker-cli` connects with the certificate of `role`."""
        certs = self.directory / "certs"
        return {
            "WORKER_SERVER": self.address,
            "WORKER_CERT_PATH": str(certs / f"{role}-client-cert.pem"),
            "WORKER_KEY_PATH": str(certs / f"{role}-client-key.pem"),
            "WORKER_CA_PATH": str(certs / "ca-cert.pem"),
        }

    def log_text(self) -> str:
        """The log of the service and its launcher so far."""
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")


def program(name: str) -> list[str]:
    """The command that runs `worker` or `worker-cli` with this Python and this package."""
    begin = name.replace("-", "_")
    return [sys.executable, "-c", f"from jobworker.cli.start import {begin}; {begin}()"]


def write_configuration(directory: Path, extra: Mapping[str, Mapping[str, object]]) -> Path:
    """Write worker.toml for a service whose files are all in `directory`."""
    certs = directory / "certs"
    sections: dict[str, dict[str, object]] = {
        "server": {"address": "127.0.0.1", "port": 0},
        "worker": {"state_dir": str(directory / "state")},
        "sandbox": {"first_uid": 0},  # other services may run on this host
        "security": {
            "ca_cert": str(certs / "ca-cert.pem"),
            "server_cert": str(certs / "server-cert.pem"),
            "server_key": str(certs / "server-key.pem"),
            "crl": str(certs / "ca-crl.pem"),
        },
    }
    for section, keys in extra.items():
        sections.setdefault(section, {}).update(keys)
    lines = []
    for section, keys in sections.items():
        lines.append(f"[{section}]")
        lines.extend(f"{key} = {_toml(value)}" for key, value in keys.items())
    path = directory / "worker.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: object) -> str:
    # JSON and TOML write strings, integers and lists of them alike (TOML 1.0, basic strings).
    return dumps(list(value) if isinstance(value, tuple) else value)


@asynccontextmanager
async def open_embedded(
    directory: Path,
    extra: Mapping[str, Mapping[str, object]] | None = None,
    *,
    guarded: bool = False,
) -> AsyncIterator[EmbeddedService]:
    """Run a service in `directory` for the block; then send SIGTERM and wait for its end.

    `extra` has settings by section and key. A `guarded` service runs in a session of its own, so a
    terminal's signals do not reach it, and ends when this process dies (`guard`); `process` is then
    the guard. Raises HostUnsupported with the end of the service's log if it does not start.
    """
    directory.chmod(0o755)
    if not (directory / "certs").exists():
        init_authority(directory / "certs", [], now=datetime.now(UTC))
    config = write_configuration(directory, extra or {})
    path = str(directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
        plain.bind(path)
        command = [*program("worker"), "serve", "--config", str(config)]
        with (directory / "log").open("ab") as log:
            process = await trio.lowlevel.open_process(
                guard.command(str(directory), command) if guarded else command,
                stdin=subprocess.PIPE if guarded else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": path},
                start_new_session=guarded,
            )
        try:
            plain.setblocking(False)
            address = await _await_ready(trio.socket.from_stdlib_socket(plain.dup()), process)
            if address is None:
                log_text = (directory / "log").read_text(errors="replace").strip()
                raise HostUnsupported(f"cannot start the service: {log_text[-2000:]}")
            yield EmbeddedService(address=address, directory=directory, process=process)
        finally:
            await _end(process)
            if guarded and process.returncode and process.returncode < 0:  # the guard was killed
                await _end_group(process.pid)
            if process.stdin is not None:
                await process.stdin.aclose()
            os.unlink(path)


async def _await_ready(notes: trio.socket.SocketType, process: trio.Process) -> str | None:
    """Wait for the address that the service announces; None if it ends or announces nothing."""
    found: str | None = None

    async def listen(scope: trio.CancelScope) -> None:
        nonlocal found
        while found is None:
            fields = (await notes.recv(4096)).decode().splitlines()
            named = dict(line.split("=", 1) for line in fields if "=" in line)
            if named.get("READY") == "1":
                found = named[ADDRESS_FIELD]
        scope.cancel()

    with notes, trio.move_on_after(START_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, nursery.cancel_scope)
            await process.wait()
            nursery.cancel_scope.cancel()
    return found


async def _end(process: trio.Process) -> None:
    with trio.move_on_after(END_SECONDS, shield=True):
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()
    if process.returncode is None:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def _end_group(group: int) -> None:
    """Send SIGTERM to a process group, and then SIGKILL, until no process of it is left.

    Each wait has a bound, END_SECONDS: the host's PID 1 may never reap an ended process, which then
    stays in the group.
    """
    with suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(group, number)
            with trio.move_on_after(END_SECONDS, shield=True):
                while True:
                    await trio.sleep(0.05)
                    os.killpg(group, 0)
