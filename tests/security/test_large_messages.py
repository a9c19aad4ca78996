"""Slots for large messages go to those who may send such, and to nobody for long."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio_websocket

from jobworker.cli.worker.embedded_service import EmbeddedService

from ..integration.conftest import running
from ..integration.wire import open_socket, open_wire
from ..services import open_embedded
from .raw_socket import CONTINUATION, TEXT, frame, open_raw
from .test_floods import large_job

SETTINGS: dict[str, dict[str, object]] = {
    "server": {"stall_timeout": "2s"},
    "limits": {"ping_interval": "100ms", "ping_timeout": "800ms"},
}
BIG = {"command": ["true"], "environment": {f"V{n}": "x" * 1000 for n in range(100)}}
SLOTS, REPLY_SLOTS = 2, 4
"""Of one name."""


@pytest.fixture(scope="module")
def hasty(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service that waits for nobody for long."""
    with running(open_directory(), SETTINGS) as made:
        yield made


async def say(socket: trio_websocket.WebSocketConnection, data: bytes) -> None:
    """Send frames as they are."""
    async with socket._stream_lock:
        await socket._stream.send_all(data)


@asynccontextmanager
async def begun(
    service: EmbeddedService, role: str
) -> AsyncIterator[trio_websocket.WebSocketConnection]:
    """A client, alive, that has sent a part of a large message."""
    async with open_socket(service, role) as socket:
        await say(socket, frame(TEXT, b" " * 60_000, first=0))
        await socket.ping()  # once it is answered the slot has been taken
        yield socket


async def test_client_that_may_run_nothing_takes_no_slot(
    open_directory: Callable[[], Path],
) -> None:
    request = {"jsonrpc": "2.0", "id": 1, "method": "job.run", "params": {"job": BIG}}
    patient = {"server": {"stall_timeout": "1h"}}
    async with open_embedded(open_directory(), patient) as service, AsyncExitStack() as stack:
        for _ in range(SLOTS):
            await stack.enter_async_context(begun(service, "viewer"))
        socket = await stack.enter_async_context(open_socket(service, "viewer"))
        with trio.fail_after(60):  # nobody is let go for saying nothing more
            await socket.send_message(json.dumps(request))
            reply = json.loads(await socket.get_message())
            assert reply["id"] is None
            assert "more than 32768 characters" in reply["error"]["message"]
            await socket.send_message('{"jsonrpc":"2.0","id":8,"method":"service.hello"}')
            assert json.loads(await socket.get_message())["id"] == 8


async def test_large_message_has_to_come_at_a_rate_where_others_wait(
    hasty: EmbeddedService,
) -> None:
    async with open_wire(hasty) as wire, AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(begun(hasty, "admin")) for _ in range(SLOTS)]
        plan = await stack.enter_async_context(trio.open_nursery())
        plan.start_soon(partial(wire.call, "job.plan", job=BIG))
        with trio.fail_after(20):
            while all(socket.closed is None for socket in sockets):
                for socket in sockets:
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await say(socket, frame(CONTINUATION, b" " * 126, first=0))
                await trio.sleep(0.1)
    closed = next(socket.closed for socket in sockets if socket.closed is not None)
    assert closed.code == 1013
    assert closed.reason is not None
    assert closed.reason.startswith("too_slow: cannot wait for the rest")


async def test_large_message_may_take_its_time_where_nobody_waits(hasty: EmbeddedService) -> None:
    request = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "job.plan", "params": {"job": BIG}})
    async with begun(hasty, "admin") as socket:
        for _ in range(40):
            await say(socket, frame(CONTINUATION, b" " * 126, first=0))
            await trio.sleep(0.1)
        await say(socket, frame(CONTINUATION, request.encode()))
        with trio.fail_after(20):
            assert json.loads(await socket.get_message())["id"] == 7


async def test_client_that_waits_for_a_slot_is_not_silent(hasty: EmbeddedService) -> None:
    async with open_wire(hasty) as wire, AsyncExitStack() as stack:
        for _ in range(SLOTS):
            await stack.enter_async_context(begun(hasty, "admin"))
        with trio.fail_after(20):  # the slots come free as the others are let go
            began = trio.current_time()
            await wire.call("job.plan", job=BIG)
            assert trio.current_time() - began > 1
            await wire.call("service.hello")


PIECE_SECONDS = 0.4


@pytest.mark.parametrize(("piece_bytes", "is_ended"), [(5_000, True), (60_000, False)])
async def test_large_reply_has_to_be_taken_at_a_rate_where_others_wait(
    piece_bytes: int, is_ended: bool, open_directory: Callable[[], Path]
) -> None:
    settings = {"server": SETTINGS["server"]}
    async with open_embedded(open_directory(), settings) as service, open_wire(service) as wire:
        job = (await wire.call("job.run", job=large_job()))["job"]
        assert isinstance(job, dict)
        ask = {"jsonrpc": "2.0", "id": 1, "method": "job.status", "params": {"id": job["id"]}}

        async def take(*, task_status: trio.TaskStatus[None]) -> None:
            async with open_raw(service, buffer=4096) as raw:
                await raw.send(frame(TEXT, json.dumps(ask).encode()))
                taken = piece = len(await raw.stream.receive_some())
                task_status.started()
                next_at = trio.current_time()
                while piece:
                    piece = 0
                    with suppress(trio.BrokenResourceError):
                        while piece < piece_bytes and (data := await raw.stream.receive_some()):
                            piece += len(data)
                    taken += piece
                    if taken > 900_000:
                        return
                    next_at += PIECE_SECONDS
                    await trio.sleep_until(next_at)  # what came late is made up for

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(REPLY_SLOTS):
                    await nursery.start(take)
                await wire.call("job.status", id=job["id"])
                nursery.cancel_scope.cancel()
        assert ("send_stalled" in service.log_text()) == is_ended
