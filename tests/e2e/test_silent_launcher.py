"""A service is ended while its launcher is stopped: it goes in time, and what runs goes on."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from jobworker.client.client import Client
from jobworker.errors import JobworkerError
from jobworker.model.job import JobSpec
from jobworker.model.lifecycle import Reason, State

from ..integration.conftest import _needs_root, child_of, left_behind, open_directory
from .restarting import open_site

__all__ = ["_needs_root", "open_directory"]

EXTRA: dict[str, dict[str, object]] = {
    "worker": {"stop_grace": "2s"},
    "sandbox": {"disk_limit": 16},
}


@pytest.mark.timeout(180)
async def test_service_that_is_ended_does_not_wait_for_a_launcher_that_is_stopped(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_site(directory, EXTRA) as site:
        site.start()
        await site.until_ready()
        launcher = child_of(site.launcher)
        async with site.client(patience_seconds=0) as client, trio.open_nursery() as nursery:
            running = await client.run(JobSpec(command=("sleep", "600")))
            os.kill(launcher, signal.SIGSTOP)
            try:
                nursery.start_soon(_run, client)
                while (await client.list(limit=1))[0].id == running.id:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                with trio.fail_after(60):
                    await site.end()  # by SIGTERM, and with code 0
            finally:
                os.kill(launcher, signal.SIGCONT)
            nursery.cancel_scope.cancel()
        site.start()
        await site.until_ready()
        async with site.client() as client:
            record = await client.job(running.id).status()
            assert record.state is State.RUNNING, "what ran was left, and goes on"
            starting = await client.job((await client.list(limit=1))[0].id).wait()
            # The launcher hears what it was asked for when it goes on: the start may be through
            # before it sees that the service has gone, and is undone else.
            ends = {(State.COMPLETED, None), (State.FAILED, Reason.LOST)}
            assert (starting.state, starting.reason) in ends
            assert (await client.job(running.id).stop(grace_seconds=0)).state is State.STOPPED
        await site.end()
    assert left_behind(directory) == []


async def _run(client: Client) -> None:
    with pytest.raises(JobworkerError):
        await client.run(JobSpec(command=("true",)))
