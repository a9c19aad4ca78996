"""Calls of one client over several connections, each to a session in memory."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import pytest
import trio
from attrs import define, evolve, field

from jobworker.client.address import Address
from jobworker.client.calls import (
    CONNECT_SECONDS,
    LARGE_BYTES,
    MOST_LOSSES,
    PATIENCE_SECONDS,
    Calls,
    Dial,
    _Tries,
)
from jobworker.client.client import Client
from jobworker.client.rpc_connection import RpcConnectionLost
from jobworker.errors import (
    Busy,
    CertificateRefused,
    ConnectionFailed,
    HostUnknown,
    JobworkerError,
    MessageTooLarge,
    NoService,
    NotFound,
    ProtocolError,
    ShuttingDown,
)
from jobworker.model.job import JobId, JobRecord
from jobworker.protocol import messages as m

from .memory_servers import RECORD, SPEC, Peer, Servers, Wire, served

UNCERTAIN = "the job may have been started"


def lost(reason: JobworkerError, *, sent: bool = True, size: int = 1) -> RpcConnectionLost:
    return RpcConnectionLost(reason, sent=sent, size=size, broke=True)


BROKE = ConnectionFailed("it broke", remedy="connect again")


def test_request_that_may_have_arrived_once_stays_so() -> None:
    told = list[bool]()
    tries = _Tries(on_asked=told.append)
    tries.report_asked(False)
    tries.lose(lost(BROKE, sent=False), "job.status")
    assert not tries.may_have_been_done
    tries.lose(lost(BROKE), "job.status")
    tries.report_asked(False)
    tries.lose(lost(BROKE, sent=False), "job.wait")
    assert told == [False, True]
    assert tries.may_have_been_done


def test_call_that_must_not_be_done_twice_is_uncertain_after_an_earlier_loss() -> None:
    tries = _Tries(UNCERTAIN)
    tries.lose(lost(BROKE, sent=False), "job.run")
    with pytest.raises(ConnectionFailed) as told:
        tries.lose(lost(BROKE), "job.run")
    assert (told.value.message, told.value.remedy) == ("it broke", UNCERTAIN)


@pytest.mark.parametrize("kind", [CertificateRefused, ProtocolError])
def test_uncertain_call_is_told_why_no_retry_can_help(kind: type[JobworkerError]) -> None:
    with pytest.raises(kind) as told:
        _Tries(UNCERTAIN).lose(lost(kind("refused", remedy="ask for one")), "job.run")
    assert told.value.remedy == f"{UNCERTAIN}; ask for one"


def test_violation_of_the_protocol_is_raised_at_once() -> None:
    violation = ProtocolError("bad")
    with pytest.raises(ProtocolError) as told:
        _Tries().lose(lost(violation), "job.wait")
    assert told.value is violation


@pytest.mark.parametrize(
    ("size", "kind"), [(LARGE_BYTES, MessageTooLarge), (LARGE_BYTES - 1, ConnectionFailed)]
)
def test_request_that_breaks_each_connection_is_too_large_from_a_bound_on(
    size: int, kind: type[JobworkerError]
) -> None:
    tries = _Tries()
    for _ in range(MOST_LOSSES - 1):
        tries.lose(lost(BROKE, size=size), "job.plan")
    with pytest.raises(kind, match="3 connections broke") as told:
        tries.lose(lost(BROKE, size=size), "job.plan")
    assert type(told.value) is kind
    assert told.value.message.endswith("it broke")
    assert told.value.remedy


async def test_call_of_a_client_without_patience_is_not_retried() -> None:
    servers = Servers([lambda peer: hang_up_after(peer, 1), answer])
    async with served(servers, patience_seconds=0) as client:
        with pytest.raises(ConnectionFailed, match="the connection broke"):
            await client.job(7).status()


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


# --- the task that keeps the connection -----------------------------------------------------


@asynccontextmanager
async def kept(dial: Dial, **options: Any) -> AsyncIterator[Calls]:
    """Calls whose task has its first connection."""
    calls = Calls(address=Address("host", 5000), dial=dial, **options)
    refusal: JobworkerError | None = None
    async with trio.open_nursery() as nursery:
        try:  # out of the nursery, which would wrap it
            await nursery.start(calls.serve)
        except JobworkerError as error:
            refusal = error
        else:
            yield calls
            await calls.aclose(goodbye=False)
        nursery.cancel_scope.cancel()
    if refusal is not None:
        raise refusal


async def ask(calls: Calls) -> JobRecord:
    return await calls.call("job.wait", m.JobParams(id=JobId(7)), JobRecord)


@define(eq=False)
class Refusing:
    """Dials servers in memory; later attempts are refused in turn, and noted."""

    servers: Servers
    refusals: list[JobworkerError] = field(factory=list)
    at: list[float] = field(factory=list)

    async def dial(self, *, task_status: trio.TaskStatus[object]) -> None:
        self.at.append(trio.current_time())
        if len(self.at) > 1 and self.refusals:
            raise self.refusals.pop(0)
        await self.servers.dial(task_status=task_status)


async def hang_up(peer: Peer) -> None:
    await hang_up_after(peer, 0)


@pytest.fixture
def full_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause is as long as it may be."""
    monkeypatch.setattr(random, "uniform", lambda _, longest: longest)


async def test_pauses_between_attempts_double_to_a_bound(
    autojump_clock: object, full_pauses: None
) -> None:
    busy: list[JobworkerError] = [
        Busy("cannot serve you"),
        *[ConnectionFailed("cannot connect")] * 8,
    ]
    line = Refusing(Servers([hang_up, answer]), busy)
    async with kept(line.dial) as calls:
        await trio.sleep(1)
        assert (await ask(calls)).id == RECORD.id
    pauses = [after - before for before, after in pairwise(line.at[1:])]
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5])


async def test_lost_connection_is_told_once_it_is_wanted(autojump_clock: object) -> None:
    lost = list[JobworkerError]()
    line = Refusing(Servers([hang_up, answer]))
    async with kept(line.dial, on_lost=lost.append) as calls:
        await trio.sleep(60)
        assert not lost
        await ask(calls)
    assert [error.message for error in lost] == ["cannot go on: the connection broke"]


async def test_connection_that_was_wanted_once_is_not_made_again_for_nobody(
    autojump_clock: object,
) -> None:
    async def answer_once(peer: Peer) -> None:
        peer.reply(await peer.call(), RECORD)
        peer.hang_up()

    line = Refusing(Servers([hang_up, answer_once, answer_once, answer]))
    async with kept(line.dial) as calls:
        await ask(calls)
        await trio.sleep(60)
        assert len(line.at) == 2
        await ask(calls)
        assert len(line.at) == 3


async def test_tasks_get_errors_of_their_own(autojump_clock: object) -> None:
    """The traceback of one that all raise would grow."""
    raised = list[ConnectionFailed]()
    line = Refusing(Servers([hang_up]))
    async with kept(line.dial, patience_seconds=1) as calls, trio.open_nursery() as nursery:

        async def fail() -> None:
            with pytest.raises(ConnectionFailed) as failed:
                await ask(calls)
            raised.append(failed.value)

        for _ in range(2):
            nursery.start_soon(fail)
    assert raised[0] is not raised[1]
    assert str(raised[0]) == str(raised[1])


async def test_without_patience_every_later_call_raises_what_was_lost(
    autojump_clock: object,
) -> None:
    line = Refusing(Servers([hang_up, answer]))
    async with kept(line.dial, patience_seconds=0) as calls:
        for _ in range(2):
            with trio.fail_after(60), pytest.raises(ConnectionFailed, match="connection broke"):
                await ask(calls)
    assert len(line.at) == 1


@pytest.mark.parametrize("kind", [HostUnknown, NoService])
async def test_start_patience_is_for_what_a_restart_may_cause(
    autojump_clock: object, kind: type[JobworkerError]
) -> None:
    refused, began = list[JobworkerError](), trio.current_time()

    async def dial(*, task_status: object) -> None:
        await trio.lowlevel.checkpoint()
        raise kind("cannot connect")

    with pytest.raises(kind):
        async with kept(dial, start_patience_seconds=9, on_refused=refused.append):
            pytest.fail("there is no connection")
    assert trio.current_time() == began
    assert not refused


async def test_server_that_does_not_answer_is_given_up(autojump_clock: object) -> None:
    async def dial(*, task_status: object) -> None:
        await trio.sleep_forever()

    began = trio.current_time()
    with pytest.raises(ConnectionFailed, match="to host:5000: no answer within 10 s"):
        async with kept(dial):
            pytest.fail("there is no connection")
    assert trio.current_time() - began == pytest.approx(CONNECT_SECONDS)


async def dismiss(peer: Peer) -> None:
    """The server ends the connection for its certificate's sake."""
    await peer.call()
    lost = CertificateRefused("cannot go on: it is revoked", remedy="ask for a new one")
    peer.to_client.send_nowait(peer.session.error(None, lost))


@pytest.mark.parametrize(
    ("again", "words"),
    [
        (
            "cannot connect: it is unknown",
            "cannot go on: it is revoked; connecting again: it is unknown",
        ),
        ("cannot go on: it is revoked", "cannot go on: it is revoked"),
    ],
)
async def test_reason_of_a_dismissal_is_told_with_that_of_the_next_refusal(
    autojump_clock: object, again: str, words: str
) -> None:
    line = Refusing(
        Servers([dismiss]), [CertificateRefused(again, remedy="wait") for _ in range(3)]
    )
    async with kept(line.dial) as calls:
        with pytest.raises(CertificateRefused) as refused:
            await ask(calls)
    assert refused.value.message == words


async def test_refusal_after_another_loss_is_told_alone(autojump_clock: object) -> None:
    line = Refusing(Servers([hang_up]), [CertificateRefused("cannot connect: it is revoked")])
    async with kept(line.dial) as calls:
        with pytest.raises(CertificateRefused, match=r"^cannot connect: it is revoked$"):
            await ask(calls)


@pytest.mark.parametrize("goodbye", [True, False])
async def test_closed_client_dials_no_more(autojump_clock: object, *, goodbye: bool) -> None:
    line = Refusing(Servers([answer, answer]))
    async with kept(line.dial) as calls:
        rpc = calls._rpc
        assert rpc is not None
        await calls.aclose(goodbye=goodbye)
        for _ in range(2):
            with trio.fail_after(60), pytest.raises(ConnectionFailed, match="client is closed"):
                await ask(calls)
        await trio.sleep(60)
    assert len(line.at) == 1
    assert cast(Wire, rpc.connection).goodbyes == (1 if goodbye else 0)
