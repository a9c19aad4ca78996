"""One client over several connections, each to a session in memory."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from attrs import define, evolve, field

from jobworker.client.address import Address
from jobworker.client.calls import PATIENCE_SECONDS, Calls
from jobworker.client.client import Client
from jobworker.errors import (
    CertificateRefused,
    ConnectionFailed,
    JobworkerError,
    NotFound,
    OutputError,
    ShuttingDown,
)
from jobworker.model.job import JobId, JobRecord, Stream
from jobworker.model.lifecycle import State
from jobworker.protocol import messages as m

from .test_client import RECORD, SPEC, Peer, Servers, served

Part = Callable[[Peer], None]
"""What a server does with one subscription."""


def nothing(_: Peer) -> None:
    """Open the subscription, and break."""


@define(eq=False)
class Logs:
    """What servers were asked for, and their plays: each has parts, then the connection breaks."""

    asked: list[m.LogParams] = field(factory=list)
    starts: tuple[m.StreamStart, ...] = ()

    def play(self, *parts: Part) -> Callable[[Peer], Awaitable[None]]:
        async def serve(peer: Peer) -> None:
            for number, part in enumerate(parts, 1):
                call = await peer.call()
                while not isinstance(call.params, m.LogParams):  # an unfollow, say
                    call = await peer.call()
                self.asked.append(call.params)
                result = m.LogResult(
                    subscription=number, offset=call.params.offset or 5, starts=self.starts
                )
                peer.reply(call, result)
                part(peer)
            peer.hang_up()

        return serve


async def follow(logs: Logs, *plays: list[Part]) -> tuple[list[bytes], list[int], JobRecord]:
    """Follow a job over these servers: the chunks, where it went on, and the final record."""
    seen, told = list[bytes](), list[int]()
    servers = Servers([logs.play(*parts) for parts in plays])

    def lost(_: JobworkerError, offset: int) -> None:
        told.append(offset)

    async with served(servers, PATIENCE_SECONDS) as client:
        output = client.job(7).output(tail_lines=2, on_break=lost)
        async for chunk in output:
            seen.append(chunk.data)
        assert output.record is not None
        return seen, told, output.record


async def test_broken_connection_goes_on_where_it_stopped(autojump_clock: object) -> None:
    def finish(peer: Peer) -> None:
        peer.output(1, 8, b"de")
        peer.end(1, 10)

    logs = Logs()
    seen, told, record = await follow(
        logs, [lambda peer: peer.output(1, 5, b"abc")], [nothing], [finish]
    )
    assert (b"".join(seen), record.state) == (b"abcde", State.COMPLETED)
    assert [(asked.offset, asked.tail_lines) for asked in logs.asked] == [
        (0, 2),
        (8, None),
        (8, None),
    ]
    assert told == [8, 8]


async def test_break_before_the_first_byte_does_not_move_the_start(autojump_clock: object) -> None:
    logs = Logs()
    seen, _, _ = await follow(logs, [nothing], [lambda peer: peer.end(1, 5)])
    assert not seen
    assert logs.asked[1].offset == 5  # where the first tail began, not a later tail
    assert logs.asked[1].tail_lines is None


async def test_streams_that_have_not_begun_begin_where_they_were_to(
    autojump_clock: object,
) -> None:
    starts = (m.StreamStart(stream=Stream.STDOUT, offset=3), m.StreamStart(stream=Stream.STDERR))
    logs = Logs(starts=starts)
    await follow(
        logs,
        [nothing],
        [lambda peer: peer.output(1, 5, b"abc")],
        [lambda peer: peer.end(1, 8)],
    )
    assert [asked.starts for asked in logs.asked] == [(), starts, starts[1:]]


async def test_stalled_follower_comes_back_on_the_same_connection(autojump_clock: object) -> None:
    def stall(peer: Peer) -> None:
        peer.output(1, 5, b"abc")
        peer.end(1, 8, name="follower_stalled", message="cannot go on sending")

    logs = Logs()
    seen, told, _ = await follow(logs, [stall, lambda peer: peer.end(2, 8)])
    assert (seen, told) == ([b"abc"], [])
    assert logs.asked[1].offset == 8


async def test_what_the_server_says_of_the_output_is_raised() -> None:
    def fail(peer: Peer) -> None:
        peer.end(1, 5, name="output_failed", message="cannot read the job's output: I/O error")

    with pytest.raises(OutputError, match="I/O error"):
        await follow(Logs(), [fail])


async def test_first_connection_must_succeed() -> None:
    with pytest.raises(ConnectionFailed, match="nobody there"):
        await follow(Logs())


async def test_patience_ends(autojump_clock: object) -> None:
    begun = trio.current_time()
    with pytest.raises(ConnectionFailed, match="nobody there"):
        await follow(Logs(), [lambda peer: peer.output(1, 5, b"abc")])
    assert PATIENCE_SECONDS <= trio.current_time() - begun <= PATIENCE_SECONDS + 10


async def hang_up_after(peer: Peer, calls: int) -> None:
    for _ in range(calls):
        await peer.call()
    peer.hang_up()


async def answer(peer: Peer) -> None:
    peer.reply(await peer.call(), RECORD)
    await trio.sleep_forever()


@pytest.mark.parametrize("method", ["wait", "status", "stop"])
async def test_what_may_be_asked_twice_is(autojump_clock: object, method: str) -> None:
    servers = Servers([lambda peer: hang_up_after(peer, 1), answer])
    async with served(servers, PATIENCE_SECONDS) as client:
        assert (await getattr(client.job(7), method)()).id == RECORD.id


async def test_call_that_breaks_each_connection_is_given_up(autojump_clock: object) -> None:
    """Its answer is too long for the line, say: the server cuts that, and can say nothing."""
    servers = Servers([lambda peer: hang_up_after(peer, 1)] * 5)
    async with served(servers, PATIENCE_SECONDS) as client:
        with pytest.raises(ConnectionFailed, match="3 connections broke before the reply"):
            await client.job(7).status()
    assert len(servers.plays) == 2


@pytest.mark.parametrize(("method", "say"), [("status", True), ("wait", False), ("stop", False)])
async def test_neither_restarts_nor_long_waits_are_held_for_a_fault_of_the_call(
    autojump_clock: object, method: str, say: bool
) -> None:
    servers = Servers([*[lambda peer: hang_up_after(peer, 1)] * 20, answer], say)
    async with served(servers, PATIENCE_SECONDS) as client:
        assert (await getattr(client.job(7), method)()).id == RECORD.id


async def test_who_stops_hears_whether_a_server_has_been_asked(autojump_clock: object) -> None:
    async def break_off(peer: Peer) -> None:
        peer.sent.close()  # whoever sends finds the line broken
        await trio.sleep(0.5)
        peer.hang_up()

    told = list[bool]()
    servers = Servers([break_off, refuse_then_hang_up, lambda peer: hang_up_after(peer, 1)])
    async with served(servers, PATIENCE_SECONDS) as client:
        with trio.move_on_after(20):
            await client.job(7).stop(on_asked=told.append)
    assert told == [True, False, True, False, True]


async def test_running_is_not_asked_twice(autojump_clock: object) -> None:
    async def run(peer: Peer) -> None:
        peer.reply(await peer.call(), m.RunResult(job=evolve(RECORD, id=JobId(8))))
        await trio.sleep_forever()

    servers = Servers([lambda peer: hang_up_after(peer, 1), run])
    async with served(servers, PATIENCE_SECONDS) as client:
        with pytest.raises(ConnectionFailed, match="may have been started"):
            await client.run(SPEC)
        assert (await client.run(SPEC)).id == 8


async def refuse_then_hang_up(peer: Peer) -> None:
    """A service that is ending, and ends."""
    call = await peer.call()
    leaving = ShuttingDown("cannot do it: the service is shutting down")
    peer.to_client.send_nowait(peer.session.error(call.id, leaving))
    await trio.sleep(0.5)
    peer.hang_up()


async def admit(peer: Peer) -> None:
    peer.reply(await peer.call(), m.RunResult(job=evolve(RECORD, id=JobId(8))))
    await trio.sleep_forever()


@pytest.mark.parametrize("method", ["wait", "status", "stop"])
async def test_service_that_is_ending_is_asked_again(autojump_clock: object, method: str) -> None:
    servers = Servers([refuse_then_hang_up, answer])
    async with served(servers, PATIENCE_SECONDS) as client:
        assert (await getattr(client.job(7), method)()).id == RECORD.id


async def test_command_that_a_service_on_its_way_out_refused_is_run_by_the_next(
    autojump_clock: object,
) -> None:
    async with served(Servers([refuse_then_hang_up, admit]), PATIENCE_SECONDS) as client:
        assert (await client.run(SPEC)).id == 8


async def test_service_that_refuses_and_does_not_end_is_not_waited_for_for_ever(
    autojump_clock: object,
) -> None:
    async def refuse(peer: Peer) -> None:
        call = await peer.call()
        leaving = ShuttingDown("cannot do it: the service is shutting down")
        peer.to_client.send_nowait(peer.session.error(call.id, leaving))
        await trio.sleep_forever()

    begun = trio.current_time()
    async with served(Servers([refuse]), PATIENCE_SECONDS) as client:
        with pytest.raises(ShuttingDown):
            await client.job(7).status()
    assert PATIENCE_SECONDS <= trio.current_time() - begun <= PATIENCE_SECONDS + 10


async def test_output_that_the_next_service_has_goes_on_there(autojump_clock: object) -> None:
    def leave(peer: Peer) -> None:
        peer.output(1, 5, b"abc")
        peer.end(1, 8, name="shutting_down", message="cannot reach job 7")

    logs = Logs()
    seen, _, record = await follow(logs, [leave], [lambda peer: peer.end(1, 8)])
    assert (seen, record.state) == ([b"abc"], State.COMPLETED)
    assert logs.asked[1].offset == 8


async def test_command_that_was_not_sent_is_run_by_the_next(autojump_clock: object) -> None:
    """The line breaks before the server can have all of the request."""

    async def break_off(peer: Peer) -> None:
        peer.sent.close()  # whoever sends finds the line broken
        await trio.sleep(0.5)
        peer.hang_up()

    async with served(Servers([break_off, admit]), PATIENCE_SECONDS) as client:
        assert (await client.run(SPEC)).id == 8


async def test_job_is_gone_though_the_answer_of_its_removal_was_lost(
    autojump_clock: object,
) -> None:
    async def forget(peer: Peer) -> None:
        call = await peer.call()
        peer.to_client.send_nowait(peer.session.error(call.id, NotFound("cannot find job 7")))
        await trio.sleep_forever()

    servers = Servers([lambda peer: hang_up_after(peer, 1), forget])
    async with served(servers, PATIENCE_SECONDS) as client:
        assert (await client.job(7).remove()).jobs == (7,)
    async with served(Servers([forget]), PATIENCE_SECONDS) as client:
        with pytest.raises(NotFound):
            await client.job(7).remove()


async def test_volume_is_not_made_twice(autojump_clock: object) -> None:
    servers = Servers([lambda peer: hang_up_after(peer, 1), answer])
    async with served(servers, PATIENCE_SECONDS) as client:
        with pytest.raises(ConnectionFailed, match="may have been made"):
            await client.make_volume("cache", 64 << 20)


@pytest.mark.parametrize("refusal", [CertificateRefused, ConnectionFailed])
async def test_refusal_of_a_later_connection_is_told_and_a_later_call_dials_again(
    autojump_clock: object, refusal: type[JobworkerError]
) -> None:
    servers = Servers([lambda peer: hang_up_after(peer, 1), answer])

    async def refuse(*, task_status: object) -> None:
        raise refusal("cannot connect: not now")

    async with served(servers, PATIENCE_SECONDS) as client:
        client._calls._dial, dial = refuse, client._calls._dial
        for _ in range(2):
            with pytest.raises(refusal, match="not now"):
                await client.job(7).wait()
        client._calls._dial = dial
        assert (await client.job(7).status()).id == RECORD.id


async def test_first_connection_may_wait_for_a_restart(autojump_clock: object) -> None:
    servers = Servers([])

    def patient() -> Calls:
        return Calls(address=Address("host"), dial=servers.dial, start_patience_seconds=10)

    async def come_up() -> None:
        await trio.sleep(3)
        servers.plays.append(answer)

    async with trio.open_nursery() as nursery:
        begun = trio.current_time()
        with pytest.raises(ConnectionFailed, match="nobody there"):
            await nursery.start(patient().serve)
        assert 10 <= trio.current_time() - begun < 12
        nursery.start_soon(come_up)
        calls = patient()
        await nursery.start(calls.serve)
        assert (await Client(calls=calls).job(7).status()).id == RECORD.id
        nursery.cancel_scope.cancel()


async def test_call_after_the_block_is_refused(autojump_clock: object) -> None:
    async with served(Servers([answer]), PATIENCE_SECONDS) as client:
        pass
    with pytest.raises(ConnectionFailed, match="this client is closed"):
        await client.job(7).status()


async def test_connection_is_not_made_anew_before_it_is_needed(autojump_clock: object) -> None:
    servers = Servers([lambda peer: hang_up_after(peer, 0), answer])
    async with served(servers, PATIENCE_SECONDS) as client:
        await trio.sleep(1000)
        assert len(servers.plays) == 1
        await client.job(7).status()


async def test_error_of_the_server_is_no_reason_to_ask_again(autojump_clock: object) -> None:
    async def refuse(peer: Peer) -> None:
        call = await peer.call()
        peer.to_client.send_nowait(peer.session.error(call.id, NotFound("cannot find job 7")))
        await trio.sleep_forever()

    servers = Servers([refuse])
    async with served(servers, PATIENCE_SECONDS) as client:
        with pytest.raises(NotFound):
            await client.job(7).status()
