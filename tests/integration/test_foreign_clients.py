"""Clients that share no code with the project: each runs a job, follows it and stops it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from .wire import open_wire

CLIENTS = Path(__file__).parents[2] / "contrib" / "clients"
NODE_MODULES = CLIENTS / "node" / "node_modules"

COMMANDS = {
    "node, binary": ["node", str(CLIENTS / "node" / "run.mjs")],
    "python, base64": [sys.executable, str(CLIENTS / "python" / "run.py")],
    "shell, text": ["bash", str(CLIENTS / "shell" / "run.sh")],
}


def missing(name: str) -> str:
    """What this machine lacks for a client; "" where it lacks nothing."""
    if name.startswith("node"):
        if shutil.which("node") is None:
            return "node"
        return "" if NODE_MODULES.is_dir() else "the packages of contrib/clients/node (npm install)"
    if name.startswith("shell"):
        return ", ".join(each for each in ("openssl", "jq", "od") if shutil.which(each) is None)
    return ""


async def start(
    service: EmbeddedService, name: str, *command: str, **variables: str
) -> trio.Process:
    if lacking := missing(name):
        pytest.skip(f"needs {lacking}")
    return await trio.lowlevel.open_process(
        [*COMMANDS[name], *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **service.environment(), **variables},
    )


async def everything(process: trio.Process, stream: trio.abc.ReceiveStream | None) -> bytes:
    assert stream is not None
    said = b""
    while data := await stream.receive_some():
        said += bytes(data)
    return said


@pytest.mark.parametrize("name", COMMANDS)
async def test_foreign_client_runs_follows_and_stops_a_job(
    service: EmbeddedService, name: str
) -> None:
    script = 'trap "exit 7" INT TERM; echo "ready, é"; echo oops >&2; while :; do sleep 0.1; done'
    process = await start(service, name, "sh", "-c", script)
    assert process.stdout is not None
    assert process.stderr is not None
    said = told = b""
    try:
        with trio.fail_after(25):  # not so long that a ping from the server would wake it
            while b"\n" not in said:
                data = await process.stdout.receive_some()
                assert data, (await everything(process, process.stderr)).decode()
                said += bytes(data)
            while b"oops\n" not in told:
                data = await process.stderr.receive_some()
                assert data, told.decode()
                told += bytes(data)
            process.send_signal(signal.SIGINT)  # it has heard all there is, and waits
            told += await everything(process, process.stderr)
            await process.wait()
    finally:
        process.kill()
    assert said.decode() == "ready, é\n"
    first, *others, last = told.decode().splitlines()
    job = first.removeprefix("job ")
    assert (others, last) == (["oops"], f"job {job}: STOPPED")
    assert process.returncode == 7
    async with open_wire(service) as wire:
        assert (await wire.call("job.status", id=int(job)))["state"] == "STOPPED"


@pytest.mark.parametrize("name", COMMANDS)
async def test_foreign_client_gets_all_of_a_long_output(
    service: EmbeddedService, name: str
) -> None:
    process = await start(service, name, "sh", "-c", "seq 1 20000; exit 3")
    try:
        with trio.fail_after(60):
            said = await everything(process, process.stdout)
            await process.wait()
    finally:
        process.kill()
    assert said == "".join(f"{number}\n" for number in range(1, 20_001)).encode()
    assert process.returncode == 3


@pytest.mark.parametrize("name", COMMANDS)
async def test_foreign_client_ends_where_its_reader_leaves(
    service: EmbeddedService, name: str
) -> None:
    process = await start(service, name, "seq", "1", "200000")
    assert process.stdout is not None
    try:
        with trio.fail_after(25):
            await process.stdout.receive_some(2)
            await process.stdout.aclose()
            told = await everything(process, process.stderr)
            await process.wait()
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGPIPE
    assert len(told.splitlines()) == 1, told.decode()  # the job's number


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("variable", "value", "code", "word"),
    [
        (
            "WORKER_CERT_PATH",
            "",
            78,
            "not set in the environment: WORKER_CERT_PATH",
        ),
        ("WORKER_CA_PATH", "/no/such/ca.pem", 72, "/no/such/ca.pem"),
        ("WORKER_SERVER", "127.0.0.1:1", 69, "cannot go on: "),
    ],
)
async def test_foreign_client_that_cannot_connect_says_why(
    service: EmbeddedService, name: str, variable: str, value: str, code: int, word: str
) -> None:
    process = await start(service, name, "true", **{variable: value})
    try:
        with trio.fail_after(25):
            told = await everything(process, process.stderr)
            await process.wait()
    finally:
        process.kill()
    assert word in told.decode()
    assert len(told.splitlines()) == 1, told.decode()
    assert process.returncode == code
    assert b"may have been started" not in told, "nothing was sent"


@pytest.mark.parametrize("name", COMMANDS)
async def test_foreign_client_tells_why_it_was_refused(service: EmbeddedService, name: str) -> None:
    process = await start(service, name, "no-such-program")
    try:
        with trio.fail_after(60):
            told = await everything(process, process.stderr)
            await process.wait()
    finally:
        process.kill()
    assert "cannot run 'no-such-program'" in told.decode()
    assert process.returncode == 70


@pytest.mark.soak
@pytest.mark.parametrize("name", COMMANDS)
async def test_foreign_client_goes_on_after_a_network_that_let_nothing_pass(
    service: EmbeddedService, name: str
) -> None:
    """Its connection stays open, as that to a service that stands still."""
    host, port = service.address.rsplit(":", 1)
    is_silent, came_back = trio.Event(), trio.Event()

    async def relay(client: trio.SocketStream) -> None:
        first = not is_silent.is_set()
        if not first:
            came_back.set()

        async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
            async for data in source:
                if not (first and is_silent.is_set()):
                    await target.send_all(data)
            copying.cancel_scope.cancel()

        server = await trio.open_tcp_stream(host, int(port))
        async with server, trio.open_nursery() as copying:
            copying.start_soon(copy, client, server)
            copying.start_soon(copy, server, client)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host=host)
        nursery.start_soon(trio.serve_listeners, relay, listeners)
        address = f"{host}:{listeners[0].socket.getsockname()[1]}"
        script = "echo one; sleep 20; echo two"
        process = await start(service, name, "sh", "-c", script, WORKER_SERVER=address)
        assert process.stdout is not None
        try:
            assert await process.stdout.receive_some() == b"one\n"
            is_silent.set()
            await came_back.wait()
            assert await everything(process, process.stdout) == b"two\n"
            assert await process.wait() == 0
        finally:
            process.kill()
        nursery.cancel_scope.cancel()
