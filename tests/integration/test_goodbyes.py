"""What a client makes of a connection's end: it goes on where it can, and says so where not."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.client.client import Client
from jobworker.client.opening import open_client
from jobworker.errors import MessageTooLarge
from jobworker.model.job import JobSpec
from jobworker.model.lifecycle import State

from .conftest import running, until
from .wire import open_wire

COUNTER = "seq 0 199; sleep 8; seq 200 399; exit 5"
"""Silent for longer than a ping may take: what the client's kernel takes counts as an answer."""
PINGS = {"limits": {"ping_interval": "200ms", "ping_timeout": "400ms"}}


@pytest.fixture(scope="module")
def hasty(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service that soon lets a silent client go."""
    with running(open_directory(), PINGS) as made:
        yield made


def client_of(service: EmbeddedService) -> AbstractAsyncContextManager[Client]:
    files = service.environment()
    return open_client(
        service.address,
        ca=files["WORKER_CA_PATH"],
        certificate=files["WORKER_CERT_PATH"],
        key=files["WORKER_KEY_PATH"],
    )


@pytest.mark.parametrize("arguments", [["log", "-f"], ["wait"]])
async def test_client_that_slept_goes_on_where_it_stopped(
    hasty: EmbeddedService, arguments: list[str]
) -> None:
    def ended() -> int:
        return hasty.log_text().count("ping_unanswered")

    async with open_wire(hasty) as wire:
        job = await wire.start("sh", "-c", COUNTER)
    before, connected = ended(), hasty.log_text().count(": connected: admin-client")
    process = subprocess.Popen(  # noqa: ASYNC220 - to be stopped by a signal
        [*program("worker-cli"), *arguments, str(job)],
        env={**os.environ, **hasty.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    await until(lambda: hasty.log_text().count(": connected: admin-client") > connected)
    process.send_signal(signal.SIGSTOP)
    await until(lambda: ended() > before)
    process.send_signal(signal.SIGCONT)
    out, err = await trio.to_thread.run_sync(process.communicate)
    assert b"ping_unanswered" in err
    assert process.returncode == (5 if arguments == ["wait"] else 0), err
    if arguments != ["wait"]:
        assert out.split() == [b"%d" % number for number in range(400)]


def too_large() -> JobSpec:
    """A request of 5.5 MB: a control character becomes six bytes of JSON."""
    return JobSpec(command=("true", *["\x01" * 100_000] * 9))


async def test_request_that_is_too_large_is_refused_and_disturbs_no_other(
    service: EmbeddedService,
) -> None:
    lost: list[str] = []
    seen = bytearray()
    outcome: list[object] = []

    async with client_of(service) as client, trio.open_nursery() as nursery:
        job = await client.run(["sh", "-c", "echo one; read x < /dev/zero; sleep 60"])

        async def follow() -> None:
            async for chunk in job.output(on_break=lambda error, _: lost.append(error.message)):
                seen.extend(chunk.data)
            outcome.append("followed")

        async def wait() -> None:
            outcome.append((await job.wait()).state)

        nursery.start_soon(follow)
        nursery.start_soon(wait)
        await until(lambda: bytes(seen) == b"one\n")
        for _ in range(2):
            with pytest.raises(MessageTooLarge, match="it was not executed"):
                with trio.fail_after(20):
                    await client.run(too_large())
        assert (await client.job(job.id).status()).state is State.RUNNING
        await job.stop(grace_seconds=0)
    assert bytes(seen) == b"one\n"
    assert sorted(map(str, outcome)) == sorted(["followed", str(State.STOPPED)])
