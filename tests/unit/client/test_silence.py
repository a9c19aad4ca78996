"""When a server counts as silent, and what the client then does."""

from typing import cast

import pytest
import trio
import wsproto.events as ws
from attrs import evolve
from wsproto.connection import Connection, ConnectionType

from jobworker.client.calls import PATIENCE_SECONDS
from jobworker.client.silence import (
    LEAST_BYTES,
    PING_SECONDS,
    SILENT_SECONDS,
    TICK_SECONDS,
    Silence,
    Traffic,
)
from jobworker.client.websocket import WebSocket
from jobworker.errors import ConnectionFailed, JobworkerError
from jobworker.model.job import JobId
from jobworker.model.lifecycle import State
from jobworker.protocol import messages as m
from jobworker.tls_stream import TLSStream

from .memory_servers import RECORD, SPEC, Peer, Servers, served
from .test_websocket import Memory

START = Traffic(frames=7, received_bytes=9000, sent_bytes=5000, taken_bytes=5000)
TO_PING = round(PING_SECONDS / TICK_SECONDS)
TO_END = round(SILENT_SECONDS / TICK_SECONDS)


def pinged(traffic: Traffic = START) -> Silence:
    """A silence in which the caller has just been told to ping."""
    silence = Silence(traffic)
    assert [silence.tick(traffic) for _ in range(TO_PING)] == [False] * (TO_PING - 1) + [True]
    return silence


def test_one_ping_is_asked_for_and_then_the_silence_is_over_the_bound() -> None:
    silence = pinged()
    silence.ping_sent(5030)
    after = evolve(START, sent_bytes=5030, taken_bytes=5030)  # a stopped process's kernel takes it
    for _ in range(TO_PING, TO_END):
        assert not silence.is_over_the_bound
        assert not silence.tick(after)
    assert silence.is_over_the_bound
    assert silence.seconds == SILENT_SECONDS


def test_answer_ends_the_silence_and_the_next_one_has_a_ping_of_its_own() -> None:
    silence = pinged()
    silence.ping_sent(5030)
    answered = Traffic(frames=8, received_bytes=9024, sent_bytes=5030, taken_bytes=5030)
    assert not silence.tick(answered)
    assert silence.seconds == 0
    assert [silence.tick(answered) for _ in range(TO_PING)][-1]


def test_long_frame_that_comes_slowly_is_a_sign_of_life() -> None:
    silence, traffic = Silence(START), START
    for _ in range(10):
        traffic = evolve(traffic, received_bytes=traffic.received_bytes + LEAST_BYTES)
        for _ in range(TO_END - 1):
            silence.tick(traffic)
        assert not silence.is_over_the_bound


def test_answers_to_pings_inside_a_frame_that_never_ends_are_none() -> None:
    """A proxy has lost bytes of a frame: what follows counts as its rest."""
    silence, traffic = Silence(START), START
    while not silence.is_over_the_bound:
        if silence.tick(traffic):
            silence.ping_sent(traffic.sent_bytes)
            traffic = evolve(traffic, received_bytes=traffic.received_bytes + 24)
    assert silence.seconds == SILENT_SECONDS


def test_long_request_before_the_ping_that_is_taken_slowly_is_a_sign_of_life() -> None:
    silence, traffic = pinged(evolve(START, sent_bytes=4_000_000)), START
    for _ in range(3):
        traffic = evolve(traffic, taken_bytes=traffic.taken_bytes + 100)
        for _ in range(TO_END - 1):
            assert not silence.tick(traffic), "the ping waits still"
        assert not silence.is_over_the_bound
    silence.ping_sent(4_000_030)
    traffic = evolve(traffic, sent_bytes=4_000_030, taken_bytes=4_000_030)
    silence.tick(traffic)
    assert silence.seconds == 0
    for _ in range(TO_END):
        assert not silence.tick(traffic), "the ping was sent"
    assert silence.is_over_the_bound


def test_requests_after_the_ping_that_a_kernel_takes_are_none() -> None:
    """Else a program that asks again and again would never notice."""
    silence, traffic = pinged(), START
    silence.ping_sent(5030)
    ticks = 0
    while not silence.is_over_the_bound:
        traffic = evolve(traffic, taken_bytes=traffic.taken_bytes + 500)
        silence.tick(traffic)
        ticks += 1
    assert ticks == TO_END - TO_PING


# --- a client ----------------------------------------------------------------------------------


async def stand_still(_: Peer) -> None:
    await trio.sleep_forever()


async def answer(peer: Peer) -> None:
    while True:
        call = await peer.call()
        if isinstance(call.params, m.LogParams):
            peer.reply(call, m.LogResult(subscription=1, offset=0))
            peer.end(1, 0)
        else:
            peer.reply(call, RECORD)


@pytest.mark.parametrize("method", ["wait", "stop", "status"])
async def test_call_goes_on_at_the_next_service(autojump_clock: object, method: str) -> None:
    began = trio.current_time()
    async with served(Servers([stand_still, answer], silent=1), PATIENCE_SECONDS) as client:
        assert (await getattr(client.job(7), method)()).id == RECORD.id
    assert SILENT_SECONDS <= trio.current_time() - began <= SILENT_SECONDS + 2


async def test_follower_goes_on_at_the_next_service(autojump_clock: object) -> None:
    async def begin(peer: Peer) -> None:
        peer.reply(await peer.call(), m.LogResult(subscription=1, offset=0))
        peer.output(1, 0, b"abc")
        await trio.sleep_forever()

    breaks = list[tuple[str, int]]()

    def note(lost: JobworkerError, offset: int) -> None:
        breaks.append((lost.message, offset))

    async with served(Servers([begin, answer], silent=1), PATIENCE_SECONDS) as client:
        output = client.job(7).output(on_break=note)
        assert [chunk.data async for chunk in output] == [b"abc"]
    assert output.record is not None
    assert output.record.state is State.COMPLETED
    assert [offset for _, offset in breaks] == [3]
    assert "does not answer" in breaks[0][0]


async def test_job_is_not_run_twice(autojump_clock: object) -> None:
    async with served(Servers([stand_still, answer], silent=1), PATIENCE_SECONDS) as client:
        with pytest.raises(ConnectionFailed, match=r"does not answer .* may have been started"):
            await client.run(SPEC)


async def test_service_that_answers_pings_is_waited_for(autojump_clock: object) -> None:
    async def answer_late(peer: Peer) -> None:
        call = await peer.call()
        await trio.sleep(1000 * SILENT_SECONDS)
        peer.reply(call, RECORD)
        await trio.sleep_forever()

    async with served(Servers([answer_late])) as client:
        assert (await client.job(7).wait()).id == RECORD.id


async def test_program_that_asks_with_time_outs_of_its_own_notices(autojump_clock: object) -> None:
    servers, asked = Servers([stand_still, answer], silent=1), 0
    async with served(servers, PATIENCE_SECONDS) as client:
        while servers.plays:
            asked += 1
            with trio.move_on_after(5):
                await client.job(7).status()
            await trio.sleep(5)
    assert asked <= 2 * SILENT_SECONDS / 10 + 2


async def test_connection_on_which_nothing_waits_is_left_alone(autojump_clock: object) -> None:
    servers = Servers([stand_still], silent=1)
    async with served(servers, PATIENCE_SECONDS) as client:
        await trio.sleep(10 * SILENT_SECONDS)
        rpc = client._calls._rpc
        assert rpc is not None
        assert rpc.failure is None


async def test_cancelled_wait_is_watched_no_more(autojump_clock: object) -> None:
    servers = Servers([stand_still], silent=1)
    async with served(servers, PATIENCE_SECONDS) as client:
        with trio.move_on_after(1):
            await client.job(JobId(7)).wait()
        await trio.sleep(10 * SILENT_SECONDS)
        rpc = client._calls._rpc
        assert rpc is not None
        assert rpc.failure is None


async def test_ping_is_answered_after_the_message_that_is_being_sent() -> None:
    """A service that serves a large request reads nothing: the client must read on all the same."""
    ping = Connection(ConnectionType.SERVER).send(ws.Ping(payload=b"there"))
    output = Connection(ConnectionType.SERVER).send(ws.TextMessage(data="output"))

    class Slow(Memory):
        """Takes what is sent when told to."""

        async def send_all(self, data: bytes) -> None:
            self.is_sending = True
            await may_go_on.wait()
            await super().send_all(data)
            self.is_sending = False

    may_go_on, memory = trio.Event(), Slow([ping + output])
    socket = WebSocket(cast(TLSStream, memory), Connection(ConnectionType.CLIENT), b"")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(socket.send, "a large request")
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(60):
            assert await socket.receive() == "output"
        may_go_on.set()
    server = Connection(ConnectionType.SERVER)
    server.receive_data(bytes(memory.sent))
    assert [type(event) for event in server.events()] == [ws.TextMessage, ws.Pong]
