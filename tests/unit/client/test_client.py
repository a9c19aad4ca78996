"""The client: what it does not even send."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from jobworker.errors import (
    InvalidParams,
    TooLarge,
)
from jobworker.model.job import JobSpec

from .memory_servers import connected


async def test_too_large_a_request_is_not_sent() -> None:
    async with connected() as (client, peer):
        spec = JobSpec(command=("x", *["a" * 100_000] * 11))
        with pytest.raises(TooLarge):
            await client.run(spec)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):
            peer.sent.receive_nowait()


@pytest.mark.parametrize("command", ["ls -l", [], ["a\0b"], ["x" * 200_000]])
async def test_command_that_can_be_none_is_not_sent(command: str | list[str]) -> None:
    async with connected() as (client, peer):
        with pytest.raises(InvalidParams, match="cannot run"):
            await client.run(command)
        with pytest.raises(trio.WouldBlock):
            peer.sent.receive_nowait()
