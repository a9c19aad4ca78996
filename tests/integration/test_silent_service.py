"""A service that stands still is noticed by its clients, and what waits goes on when it runs again.

The bounds of `client.silence` are shorter here, by the same factor for pings and for the end.
"""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import pytest
import trio
import wsproto.events as ws

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.client import silence
from jobworker.client.client import Client
from jobworker.client.opening import open_client
from jobworker.errors import ConnectionFailed
from jobworker.model.job import JobSpec
from jobworker.model.lifecycle import State
from jobworker.server.fairness.slots import LARGE_BYTES
from jobworker.server.requests.watches import LIFE_SECONDS

from .wire import open_socket

SLOTS_OF_A_NAME = 2
"""`OperationContext.requests`."""

PING_SECONDS, SILENT_SECONDS = 1.0, 3.0
SHORT = (
    "from jobworker.client import calls, silence\n"
    f"silence.PING_SECONDS, silence.SILENT_SECONDS = {PING_SECONDS}, {SILENT_SECONDS}\n"
    "calls.PATIENCE_SECONDS, calls.CONNECT_SECONDS = {patience}, 3.0\n"
    "from jobworker.cli.start import worker_cli; worker_cli()\n"
)
"""Runs `worker-cli` with these bounds."""


@pytest.fixture(autouse=True)
def _short_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "PING_SECONDS", PING_SECONDS)
    monkeypatch.setattr(silence, "SILENT_SECONDS", SILENT_SECONDS)


@contextmanager
def stopped(service: EmbeddedService) -> Iterator[None]:
    """A block in which the service's process stands still."""
    os.kill(service.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(service.process.pid, signal.SIGCONT)


@asynccontextmanager
async def connected(
    service: EmbeddedService, lost: list[str], patience_seconds: float = 600
) -> AsyncIterator[Client]:
    """A client that notes each lost connection."""
    files = service.environment()
    async with open_client(
        service.address,
        ca=files["WORKER_CA_PATH"],
        certificate=files["WORKER_CERT_PATH"],
        key=files["WORKER_KEY_PATH"],
        patience_seconds=patience_seconds,
        on_lost=lambda error: lost.append(str(error)),
    ) as client:
        yield client


async def noticed(lost: list[str]) -> None:
    """Wait until the client has lost its connection."""
    while not lost:  # noqa: ASYNC110 - a callback appends
        await trio.sleep(0.05)


async def test_what_waits_goes_on_when_the_service_answers_again(service: EmbeddedService) -> None:
    lost, ended, resumed = list[str](), list[str](), list[int]()
    async with connected(service, lost) as client:
        job = await client.run(JobSpec(command=("sh", "-c", "echo one; sleep 20; echo two")))
        other = await client.run(JobSpec(command=("sleep", "600")))
        output = job.output(on_break=lambda _, offset: resumed.append(offset))
        assert (await anext(output)).data == b"one\n"

        async def follow() -> None:
            assert b"".join([chunk.data async for chunk in output]) == b"two\n"
            ended.append("follow")

        async def wait() -> None:
            assert (await client.job(job.id).wait()).state is State.COMPLETED
            ended.append("wait")

        async def stop() -> None:
            assert (await client.job(other.id).stop(grace_seconds=0)).state is State.STOPPED
            ended.append("stop")

        async def look() -> None:
            await client.job(job.id).status()
            ended.append("status")

        async with trio.open_nursery() as nursery:
            with stopped(service):
                for task in (follow, wait, stop, look):
                    nursery.start_soon(task)
                await noticed(lost)
    assert sorted(ended) == ["follow", "status", "stop", "wait"]
    assert resumed == [len("one\n")]
    assert "does not answer: nothing has arrived for 3 s" in lost[0]


async def test_command_that_a_silent_service_may_have_is_not_run_twice(
    service: EmbeddedService,
) -> None:
    async with connected(service, []) as client:
        await client.hello()
        refused = pytest.raises(ConnectionFailed, match="does not answer")
        with stopped(service), refused as caught:
            await client.run(["true"])
        assert "may have been started" in caught.value.remedy


async def test_call_without_patience_raises(service: EmbeddedService) -> None:
    async with connected(service, [], patience_seconds=0) as client:
        await client.hello()
        refused = pytest.raises(ConnectionFailed, match=r"does not answer.*is it stopped")
        with stopped(service), refused:
            await client.list()


async def test_idle_wait_and_blocked_event_loop_are_no_silence(service: EmbeddedService) -> None:
    """The service answers pings, and what arrived while the loop stood still counts."""
    lost = list[str]()
    async with connected(service, lost) as client, trio.open_nursery() as nursery:
        job = await client.run(["sleep", "600"])
        nursery.start_soon(job.wait)
        await trio.sleep(2 * SILENT_SECONDS)
        subprocess.run(["sleep", str(2 * SILENT_SECONDS)], check=True)  # noqa: ASYNC221
        await trio.sleep(2 * SILENT_SECONDS)
        assert not lost
        await job.stop(grace_seconds=0)


async def test_large_request_that_waits_for_its_turn_is_no_silence(
    service: EmbeddedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the service reads nothing from this client, not even its ping."""
    monkeypatch.setattr(silence, "PING_SECONDS", 0.5 * LIFE_SECONDS)
    monkeypatch.setattr(silence, "SILENT_SECONDS", 1.5 * LIFE_SECONDS)
    lost, part = list[str](), ws.TextMessage(data=" " * 4 * LARGE_BYTES, message_finished=False)
    variables = {f"VARIABLE_{number}": "x" * 1000 for number in range(500)}
    async with (
        connected(service, lost, patience_seconds=0) as client,
        trio.open_nursery() as nursery,
        AsyncExitStack() as others,
    ):
        for _ in range(SLOTS_OF_A_NAME):
            holder = await others.enter_async_context(open_socket(service))
            await holder._send(part)
            await holder.ping()  # what came before was read
        nursery.start_soon(client.run, JobSpec(command=("true",), environment=variables))
        await trio.sleep(2.2 * LIFE_SECONDS)
        assert len(nursery.child_tasks) == 1
    assert not lost


def started(
    service: EmbeddedService, *arguments: str, patience: float
) -> "subprocess.Popen[bytes]":
    """`worker-cli` with short bounds."""
    return subprocess.Popen(
        [sys.executable, "-c", SHORT.format(patience=patience), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **service.environment()},
    )


async def first_line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stderr is not None
    return (await trio.to_thread.run_sync(process.stderr.readline)).decode()


async def ended(process: "subprocess.Popen[bytes]") -> tuple[str, str, int]:
    out, err = await trio.to_thread.run_sync(process.communicate)
    return out.decode(), err.decode(), process.returncode


async def test_command_line_says_so_and_goes_on(service: EmbeddedService) -> None:
    async with connected(service, []) as client:
        job = await client.run(["sh", "-c", "echo one; sleep 5; echo two"])
    process = started(service, "log", "-f", str(job.id), patience=600)
    assert process.stdout is not None
    assert await trio.to_thread.run_sync(process.stdout.readline) == b"one\n"
    with stopped(service):
        said = await first_line(process)
    assert "does not answer: nothing has arrived for 3 s" in said
    assert said.endswith("going on from byte 4\n")
    assert await ended(process) == ("two\n", "", 0)


async def test_command_line_gives_up_in_the_end(service: EmbeddedService) -> None:
    async with connected(service, []) as client:
        job = await client.run(["sh", "-c", "echo one; exec sleep 600"])
        process = started(service, "log", "-f", str(job.id), patience=0.5)
        assert process.stdout is not None
        assert await trio.to_thread.run_sync(process.stdout.readline) == b"one\n"
        with stopped(service):
            said = await first_line(process)
            out, err, code = await ended(process)
        assert "does not answer" in said
        assert (out, code) == ("", 69)
        assert "no answer within 3 s" in err
        await job.stop(grace_seconds=0)


async def test_command_line_that_stood_still_itself_says_nothing(service: EmbeddedService) -> None:
    """As on a machine that slept: what arrived meanwhile is read before anything is judged."""
    async with connected(service, []) as client:
        job = await client.run(["sh", "-c", "echo one; exec sleep 600"])
        process = started(service, "log", "-f", str(job.id), patience=600)
        assert process.stdout is not None
        assert await trio.to_thread.run_sync(process.stdout.readline) == b"one\n"
        for _ in range(4):  # at one of them, no answer to a ping is on its way
            process.send_signal(signal.SIGSTOP)
            await trio.sleep(1.5 * SILENT_SECONDS)
            process.send_signal(signal.SIGCONT)
            await trio.sleep(1.5 * PING_SECONDS)
        await job.stop(grace_seconds=0)
        assert await ended(process) == ("", "", 0)
