"""A job's output that ends with an error does so however often its consumer asks."""

import pytest

from jobworker.errors import (
    Busy,
    InternalError,
    JobworkerError,
    MalformedJSON,
    NotFound,
    OutputError,
)
from jobworker.protocol import messages as m

from .memory_servers import Peer, Servers, served


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("not_found", NotFound),
        ("output_failed", OutputError),
        ("busy", Busy),
        ("an_error_of_a_later_version", InternalError),
    ],
)
async def test_error_that_ends_the_output_is_raised_again(
    name: str, kind: type[JobworkerError]
) -> None:
    async def cut(peer: Peer) -> None:
        peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
        peer.output(1, 0, b"abc")
        peer.end(1, 3, name=name, message="cannot go on: it was cut")

    async with served(Servers([cut])) as client:
        output = client.job(7).output()
        assert (await anext(output)).data == b"abc"
        for _ in range(3):
            with pytest.raises(kind, match="it was cut"):
                await anext(output)
            assert output.receive_nowait() is None
            assert output.record is None, "the output is not whole"
        assert output.offset == 3


async def test_end_of_a_whole_output_is_raised_again() -> None:
    async def finish(peer: Peer) -> None:
        peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
        peer.end(1, 0)

    async with served(Servers([finish])) as client:
        output = client.job(7).output()
        for _ in range(3):
            with pytest.raises(StopAsyncIteration):
                await anext(output)
            assert output.record is not None


async def test_violation_that_ends_the_connection_is_raised_again() -> None:
    async def babble(peer: Peer) -> None:
        peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
        peer.to_client.send_nowait("no JSON")

    async with served(Servers([babble])) as client:
        output = client.job(7).output()
        for _ in range(3):
            with pytest.raises(MalformedJSON):
                await anext(output)
            assert output.record is None
