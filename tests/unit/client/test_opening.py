"""Opening a client: what it checks, what ends its block, and what comes out of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from jobworker.client import opening
from jobworker.client.address import Address
from jobworker.client.client import Client
from jobworker.client.credentials import Credentials
from jobworker.client.opening import open_client
from jobworker.errors import (
    ConnectionFailed,
    CredentialsUnusable,
    InvalidParams,
    JobworkerError,
    LoopMissing,
    NotFound,
)

from .memory_servers import RECORD, Peer, Servers, Wire

FILES: dict[str, Any] = {"ca": "ca.pem", "certificate": Path("c.pem"), "key": Path("k.pem")}
Opened = Callable[..., AbstractAsyncContextManager[Client]]


async def answer(peer: Peer) -> None:
    """Answer each call by the record."""
    while True:
        peer.reply(await peer.call(), RECORD)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Opens a client of servers in memory."""

    @asynccontextmanager
    async def opened(
        *plays: Callable[[Peer], Awaitable[None]],
        address: str | Address = "host:5000",
        **options: Any,
    ) -> AsyncIterator[Client]:
        servers = Servers(list(plays))

        async def dial(where: Address, files: Credentials, *, task_status: Any) -> None:
            assert where == Address("host", 5000)
            names = [path.name for path in (files.ca, files.certificate, files.key)]
            assert names == ["ca.pem", "c.pem", "k.pem"]
            await servers.dial(task_status=task_status)

        monkeypatch.setattr(opening, "_dial", dial)

        async def renewed(_: Credentials) -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(Credentials, "renewed", renewed)
        async with open_client(address, **FILES, **options) as client:
            yield client

    return opened


# --- arguments ------------------------------------------------------------------------------


def test_outside_of_trio_it_is_told_what_to_do() -> None:
    manager = open_client("host", **FILES)
    with pytest.raises(LoopMissing, match="no Trio event loop runs here") as told:
        manager.__aenter__().send(None)
    assert "trio.run" in told.value.remedy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"address": 5}, "address: must be a string, not"),
        ({"address": ""}, "cannot connect: "),
        ({"ca": 5}, "ca: must be the path of a file, not"),
        ({"certificate": None}, "certificate: must be the path of a file, not"),
        ({"key": b"k.pem"}, "key: must be the path of a file, not"),
        ({"patience_seconds": -1}, "patience_seconds: must be 0 or more seconds, not -1"),
        ({"patience_seconds": float("nan")}, "patience_seconds: must be 0 or more seconds"),
        ({"patience_seconds": True}, "patience_seconds: must be 0 or more seconds"),
        ({"patience_seconds": 10**400}, "one of hundreds of digits"),
        ({"start_patience_seconds": "5"}, "start_patience_seconds: must be 0 or more seconds"),
        ({"on_lost": 5}, "on_lost"),
        ({"on_refused": 5}, "on_refused"),
    ],
)
async def test_bad_argument_is_refused_by_its_name(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParams, match="cannot connect") as refused:
        async with open_client(**{"address": "host", **FILES, **arguments}):
            pytest.fail("it connects")
    assert words in refused.value.message


async def test_infinite_patience_and_an_address_that_is_one_are_taken(opened: Opened) -> None:
    async with opened(
        answer, address=Address("host", 5000), patience_seconds=float("inf")
    ) as client:
        assert (await client.job(7).wait()).id == RECORD.id


async def test_files_are_read_before_anything_is_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dial(*_: object, **__: object) -> None:
        pytest.fail("it dials")

    monkeypatch.setattr(opening, "_dial", dial)
    with pytest.raises(CredentialsUnusable, match=r"ca\.pem"):
        async with open_client("host", **FILES):
            pytest.fail("it opens")


# --- the block ------------------------------------------------------------------------------


async def test_refusal_of_the_first_connection_is_raised_as_it_is(opened: Opened) -> None:
    with pytest.raises(ConnectionFailed, match="nobody there"):
        async with opened():
            pytest.fail("there is no connection")


async def test_first_connection_is_tried_for_the_start_patience(
    opened: Opened, autojump_clock: trio.testing.MockClock
) -> None:
    refused, began = list[str](), trio.current_time()
    with pytest.raises(ConnectionFailed, match="nobody there"):
        async with opened(
            start_patience_seconds=3, on_refused=lambda error: refused.append(error.message)
        ):
            pytest.fail("there is no connection")
    assert 3 <= trio.current_time() - began < 4
    assert refused == ["cannot connect: nobody there"], "once"


@pytest.mark.parametrize("raised", [NotFound("cannot find it"), ValueError(), KeyboardInterrupt()])
async def test_what_the_block_raises_comes_out_as_it_is(
    opened: Opened, raised: BaseException
) -> None:
    with pytest.raises(type(raised)) as caught:
        async with opened(answer):
            raise raised
    assert caught.value is raised


async def test_client_of_an_ended_block_is_closed(opened: Opened) -> None:
    async with opened(answer) as client:
        assert (await client.job(7).wait()).id == RECORD.id
    with pytest.raises(ConnectionFailed, match="this client is closed"):
        await client.job(7).wait()


@pytest.mark.parametrize("fails", [False, True])
async def test_server_hears_a_goodbye(opened: Opened, *, fails: bool) -> None:
    with suppress(NotFound):
        async with opened(answer) as client:
            rpc = client._calls._rpc
            if fails:
                raise NotFound("cannot find it")
    assert rpc is not None
    assert cast(Wire, rpc.connection).goodbyes == 1


async def test_cancelled_block_may_still_call_while_it_ends(opened: Opened) -> None:
    seen = list[int]()
    with trio.CancelScope() as scope:
        async with opened(answer) as client:
            try:
                scope.cancel()
                await trio.sleep_forever()
            finally:
                with trio.move_on_after(5, shield=True):
                    seen.append((await client.job(7).stop()).id)
    assert seen == [RECORD.id]
    assert scope.cancelled_caught


async def test_block_that_is_cancelled_before_it_is_connected_leaves_at_once(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dial(self: Servers, *, task_status: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Servers, "dial", dial)
    with trio.CancelScope() as scope:
        scope.deadline = trio.current_time() + 0.01
        async with opened():
            pytest.fail("there is no connection")
    assert scope.cancelled_caught


@pytest.mark.parametrize("raised", [ValueError("mine"), SystemExit(3)])
async def test_what_a_callback_raises_ends_the_block_and_comes_out(
    opened: Opened, autojump_clock: trio.testing.MockClock, raised: BaseException
) -> None:
    async def hang_up(peer: Peer) -> None:
        await trio.lowlevel.checkpoint()
        peer.hang_up()

    def on_lost(_: JobworkerError) -> None:
        raise raised

    with pytest.raises(type(raised)) as caught:
        async with opened(hang_up, answer, on_lost=on_lost) as client:
            await client.job(7).wait()
    assert caught.value is raised


async def test_what_a_callback_raises_ends_a_block_that_calls_nothing(
    opened: Opened, autojump_clock: trio.testing.MockClock
) -> None:
    async def hang_up(peer: Peer) -> None:
        await trio.lowlevel.checkpoint()
        peer.hang_up()

    def on_lost(_: JobworkerError) -> None:
        raise ValueError("mine")

    async def call(client: Client) -> None:
        with suppress(JobworkerError):
            await client.job(7).wait()

    async def use() -> None:
        async with opened(hang_up, on_lost=on_lost) as client, trio.open_nursery() as nursery:
            nursery.start_soon(call, client)
            await trio.sleep_forever()

    with trio.fail_after(60), pytest.raises(ValueError, match="mine"):
        await use()


async def test_client_that_has_no_patience_does_not_dial_again(opened: Opened) -> None:
    async def hang_up(peer: Peer) -> None:
        await trio.lowlevel.checkpoint()
        peer.hang_up()

    async with opened(hang_up, answer, patience_seconds=0) as client:
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionFailed, match="the connection broke"):
            await client.job(7).wait()
