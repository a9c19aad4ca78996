"""The conversation: order of calls, replies and output, limits, and the end of a connection."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from jobworker.config.limits import ConnectionLimits
from jobworker.config.roles import role_table
from jobworker.errors import InvalidParams, NotFound, TooManyFollows, TooSlow
from jobworker.incidents import Incidents
from jobworker.jobs.history.history import History
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.job import JobId
from jobworker.protocol import messages as m
from jobworker.protocol.closing import TOO_BIG
from jobworker.protocol.session import Encoded
from jobworker.sandbox.service.host_facts import HostFacts
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.authorization import Authorization, Caller
from jobworker.server.delivery.subscriptions import Subscriptions
from jobworker.server.fairness.call_budget import CALL_BYTES
from jobworker.server.fairness.connection_limiter import ConnectionLimiter
from jobworker.server.fairness.fair_scheduling import ActiveClients, FairThreadPool
from jobworker.server.fairness.send_budget import SendBudget
from jobworker.server.fairness.slots import LARGE_BYTES, Slots
from jobworker.server.fairness.wait_quota import WaitQuota
from jobworker.server.host.disk_promises import DiskPromises
from jobworker.server.reporting.counters import LIMITS_REACHED
from jobworker.server.requests import operations
from jobworker.server.requests.conversation import (
    SMALL_FRAMES_BURST,
    SMALL_FRAMES_PER_SECOND,
    Conversation,
)
from jobworker.server.requests.operations import OperationContext
from jobworker.server.requests.read_backpressure import ReadBackpressure

from ...strategies import record
from .played_socket import NAME, PlayedSocket, client

NO_PINGS = ConnectionLimits(ping_interval="0")
TWO_REQUESTS = ConnectionLimits(ping_interval="0", max_requests_in_flight=2)
LONG = "x" * (LARGE_BYTES + 1)
PLAN = {"job": {"command": ["any"]}}
LARGE_PLAN = {"job": {"command": ["any", LONG]}}


class Talk:
    """A conversation, its client, and operations that a test plays."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, role: str, limits: ConnectionLimits | None
    ) -> None:
        self.socket, self.client = PlayedSocket(), client(role)
        active_clients = ActiveClients()
        self.context = OperationContext(
            supervisor=cast(Supervisor, SimpleNamespace(record=trio.sleep_forever)),
            launcher=cast(LauncherClient, None),
            promises=cast(DiskPromises, None),
            host=cast(HostFacts, None),
            runtimes=frozenset(),
            authorization=Authorization(role_table({}), longest_seconds=60),
            auditor=Auditor(cast(History, None), lambda: datetime.now(UTC)),
            incidents=Incidents(),
            stall_seconds=5,
            limiter=ConnectionLimiter(limits or NO_PINGS),
            active_clients=active_clients,
            send_budget=SendBudget(active_clients),
            waits=WaitQuota(10),
            replies=Slots(in_all=2, for_each=1),
            requests=Slots(in_all=2, for_each=1),
        )
        self.conversation = Conversation(self.socket.framed, self.client, self.context)
        self.served = list[str]()
        """The operations that have begun."""
        self._monkeypatch = monkeypatch

    def play(self, method: str, operation: Callable[..., Awaitable[object]] | object) -> None:
        """Have an operation give this result, raise this error or be this function."""

        async def serve(_: object, caller: Caller, params: object) -> object:
            await trio.lowlevel.checkpoint()
            self.served.append(method)
            if isinstance(operation, Exception):
                raise operation
            return await operation(caller, params) if callable(operation) else operation

        self._monkeypatch.setitem(operations.OPERATIONS, method, serve)

    def hold(self, method: str, result: object) -> trio.Event:
        """Have an operation wait for an event before it gives its result."""
        event = trio.Event()

        async def wait(*_: object) -> object:
            await event.wait()
            return result

        self.play(method, wait)
        return event

    def reached(self) -> set[str]:
        """The names of the limits that the client has reached."""
        counted = self.context.limiter.counters.statistics()
        return {label for name, label in counted if name == LIMITS_REACHED}

    def audited(self) -> list[tuple[str, str]]:
        return [(row.action, row.outcome) for row in self.context.auditor._waiting]

    @asynccontextmanager
    async def served_in_background(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.conversation.serve)
            nursery.start_soon(self.conversation.end_when_dismissed)
            try:
                yield
            finally:
                self.socket.takes.set()  # a message that is being sent is shielded
                nursery.cancel_scope.cancel()


TalkOf = Callable[..., Talk]


@pytest.fixture
def talk_of(monkeypatch: pytest.MonkeyPatch) -> TalkOf:
    def make(role: str = "admin", limits: ConnectionLimits | None = None) -> Talk:
        return Talk(monkeypatch, role, limits)

    return make


async def until(true: Callable[[], bool]) -> None:
    """Wait for what comes true."""
    while not true():  # noqa: ASYNC110
        await trio.sleep(0.001)


async def settle() -> None:
    """Wait until no task can go on; a name's turns come after short rests."""
    await trio.testing.wait_all_tasks_blocked(0.02)


# --- replies --------------------------------------------------------------------------------


async def test_each_call_is_answered_under_its_id(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.play("job.stop", NotFound("cannot find it", remedy="look for it"))
    async with talk.served_in_background():
        talk.socket.say("service.hello", "one")
        talk.socket.say("job.stop", 2, id=7)
        await settle()
        assert not talk.conversation._calls, "they leave nothing behind"
    replies = talk.socket.replies()
    assert replies["one"]["result"]["name"] == NAME
    assert replies[2]["error"]["data"] == {"name": "not_found", "remedy": "look for it"}
    assert "result" not in replies[2]


async def test_notification_is_served_without_a_reply(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.play("job.prune", m.Removed(jobs=(), bytes=0))
    talk.play("job.stop", NotFound("cannot find it"))
    async with talk.served_in_background():
        talk.socket.say("job.prune")
        talk.socket.say("job.stop", id=7)
        await settle()
    assert sorted(talk.served) == ["job.prune", "job.stop"]
    assert talk.socket.sent == []


async def test_call_that_waits_delays_no_other_call(talk_of: TalkOf) -> None:
    talk = talk_of()
    ended = talk.hold("job.wait", Encoded("{}"))
    async with talk.served_in_background():
        talk.socket.say("job.wait", 1, id=7)
        talk.socket.say("job.wait", 2, id=8)
        talk.socket.say("service.hello", 3)
        await settle()
        assert set(talk.socket.replies()) == {3}
        assert len(talk.conversation._calls) == 2
        ended.set()
        await settle()
    assert set(talk.socket.replies()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("method", "params"),
    [("job.list", {}), ("job.status", {"id": 7}), ("job.plan", PLAN), ("volume.list", {})],
)
async def test_reply_that_may_be_long_is_made_when_the_one_before_was_taken(
    talk_of: TalkOf, method: str, params: dict[str, object]
) -> None:
    talk = talk_of()
    talk.play(method, Encoded("{}"))
    talk.socket.takes = trio.Event()
    async with talk.served_in_background():
        for id_ in (1, 2):
            talk.socket.say(method, id_, **params)
        await settle()
        assert talk.served == [method]
        talk.socket.takes.set()
        await settle()
    assert set(talk.socket.replies()) == {1, 2}


@pytest.mark.parametrize("method", ["job.credit", "job.unfollow"])
async def test_credit_is_served_before_the_next_message(talk_of: TalkOf, method: str) -> None:
    talk = talk_of()
    event = talk.hold(method, m.Nothing())
    async with talk.served_in_background():
        params = {"subscription": 1, **({"bytes": 1} if method == "job.credit" else {})}
        talk.socket.say(method, **params)
        talk.socket.say("service.hello", 1)
        await settle()
        assert (talk.socket.unread, talk.socket.sent) == (1, [])
        event.set()
        await settle()
    assert set(talk.socket.replies()) == {1}


async def test_internal_fault_ends_its_call_alone_and_is_recorded(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.play("job.list", ValueError("secret of the service"))
    async with talk.served_in_background():
        talk.socket.say("job.list", 1)
        talk.socket.say("service.hello", 2)
        await settle()
    error = talk.socket.replies()[1]["error"]
    assert error["data"]["name"] == "internal"
    assert "job.list: an internal fault (incident " in error["message"]
    assert "secret" not in json.dumps(error)
    assert error["data"]["remedy"]
    assert talk.context.incidents.statistics() == {"call": 1}
    assert "result" in talk.socket.replies()[2]


# --- requests that are refused --------------------------------------------------------------


async def test_malformed_message_is_answered_and_audited(talk_of: TalkOf) -> None:
    talk = talk_of()
    async with talk.served_in_background():
        talk.socket.say_text("no JSON")
        talk.socket.say("job.guess", 2)
        talk.socket.say("job.guess")
        talk.socket.say("service.hello", 3)
        await settle()
    replies = talk.socket.replies()
    assert replies[None]["error"]["data"]["name"] == "parse_error"
    assert replies[2]["error"]["data"]["name"] == "method_not_found"
    assert len(talk.socket.sent) == 3, "a notification gets no reply"
    refused = "request.refused"
    assert talk.audited() == [(refused, "parse_error"), *[(refused, "method_not_found")] * 2]
    assert talk.reached() == set()


async def test_denied_call_is_audited_as_one(talk_of: TalkOf) -> None:
    talk = talk_of("viewer")
    async with talk.served_in_background():
        talk.socket.say("job.run", 1, job={"command": 5})
        await settle()
    assert talk.socket.replies()[1]["error"]["data"]["name"] == "permission_denied"
    assert talk.audited() == [("job.run", "permission_denied")]


async def test_one_request_too_many_is_a_limit_and_not_malformed(talk_of: TalkOf) -> None:
    talk = talk_of(limits=TWO_REQUESTS)
    talk.hold("job.wait", Encoded("{}"))
    async with talk.served_in_background():
        for id_ in range(3):
            talk.socket.say("job.wait", id_, id=7)
        await settle()
        assert talk.socket.replies()[2]["error"]["data"]["name"] == "too_many_requests"
    assert talk.served == ["job.wait"] * 2
    assert talk.reached() == {"too_many_requests"}
    assert talk.audited() == []


async def test_one_subscription_too_many_is_a_limit(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.play("job.log", TooManyFollows("cannot subscribe"))
    async with talk.served_in_background():
        talk.socket.say("job.log", 1, id=7)
        await settle()
    assert talk.socket.replies()[1]["error"]["data"]["name"] == "too_many_follows"
    assert talk.reached() == {"too_many_follows"}


async def test_reader_waits_while_too_many_replies_are_not_taken(talk_of: TalkOf) -> None:
    talk = talk_of(limits=TWO_REQUESTS)
    talk.socket.takes = trio.Event()
    async with talk.served_in_background():
        for id_ in range(20):
            talk.socket.say("service.hello", id_)
        await settle()
        assert talk.socket.unread >= 16, "some are being sent, and one waits"
        talk.socket.takes.set()
        await until(lambda: len(talk.socket.sent) == 20)
    assert set(talk.socket.replies()) == set(range(20))


@pytest.mark.parametrize(
    "outcome", [Encoded("{}"), NotFound("cannot find it")], ids=["reply", "error"]
)
@pytest.mark.parametrize("method", ["service.hello", "job.wait", "job.stop", "job.credit"])
async def test_reader_waits_while_the_calls_of_its_name_cost_too_much(
    talk_of: TalkOf, method: str, outcome: object
) -> None:
    talk = talk_of()
    talk.context.calls.for_each = 3 * CALL_BYTES
    talk.play(method, outcome)
    talk.socket.takes = trio.Event()
    params = {"subscription": 1, "bytes": 1} if method == "job.credit" else {"id": 7}
    async with talk.served_in_background():
        for id_ in range(20):
            talk.socket.say(method, id_, **({} if method == "service.hello" else params))
        await settle()
        assert talk.socket.unread == 16, "three are being sent, and one waits"
        assert talk.conversation.intake.is_stopped, "so the client gets pongs"
        talk.socket.takes.set()
        await until(lambda: len(talk.socket.sent) == 20)
        await settle()
        assert not talk.conversation.intake.is_stopped
        assert not talk.context.calls.taken_bytes
    assert set(talk.socket.replies()) == set(range(20))


async def test_calls_of_a_client_that_is_gone_cost_nothing(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.socket.takes = trio.Event()
    async with talk.served_in_background():
        for id_ in range(20):
            talk.socket.say("service.hello", id_)
        await settle()
        assert talk.context.calls.taken_bytes > 20 * CALL_BYTES
        talk.client.dismiss("gone")
        await until(lambda: not talk.context.calls.taken_bytes)


async def test_credits_behind_calls_that_wait_for_a_job_are_read(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.context.calls.for_each = CALL_BYTES

    async def wait(caller: Caller, _: object) -> object:
        with caller.cost.waiting():
            await trio.sleep_forever()

    talk.play("job.wait", wait)
    talk.play("job.credit", m.Nothing())
    async with talk.served_in_background():
        for id_ in range(5):
            talk.socket.say("job.wait", id_, id=7)
        talk.socket.say("job.credit", subscription=1, bytes=1)
        await until(lambda: talk.served == ["job.wait"] * 5 + ["job.credit"])


async def test_reader_waits_while_too_many_notifications_are_served(talk_of: TalkOf) -> None:
    talk = talk_of(limits=TWO_REQUESTS)
    done = talk.hold("job.wait", Encoded("{}"))
    async with talk.served_in_background():
        for _ in range(20):
            talk.socket.say("job.wait", id=7)
        await settle()
        assert talk.socket.unread >= 16, "some are being served, and one waits"
        done.set()
        await until(lambda: len(talk.served) == 20)


# --- large messages -------------------------------------------------------------------------


async def test_only_who_may_run_jobs_may_send_a_large_message(
    talk_of: TalkOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: object) -> None:
        pytest.fail("it is decoded")

    monkeypatch.setattr(FairThreadPool, "run", run)
    talk = talk_of("viewer")
    assert talk.conversation.refuses_large()
    assert not talk_of().conversation.refuses_large()
    async with talk.served_in_background():
        talk.socket.say("job.list", 1, name=LONG)
        await settle()
    error = talk.socket.replies()[None]["error"]
    assert error["data"]["name"] == "permission_denied"
    assert f"more than {LARGE_BYTES} characters" in error["message"]
    assert "admin" in error["data"]["remedy"]
    assert talk.audited() == [("request.refused", "permission_denied")]


async def test_nothing_is_read_until_a_large_request_is_served(talk_of: TalkOf) -> None:
    talk = talk_of()
    served, begun = trio.Event(), trio.Event()

    async def plan(*_: object) -> object:
        begun.set()
        await served.wait()
        return m.Plan(limits=record(1).spec.limits, steps=())

    talk.play("job.plan", plan)
    async with talk.served_in_background():
        await talk.conversation.wait_for_room(LARGE_BYTES + 1)
        assert talk.context.requests.statistics().taken == 1
        talk.socket.say("job.plan", 1, **LARGE_PLAN)
        talk.socket.say("service.hello", 2)
        await begun.wait()
        await settle()
        assert talk.socket.unread == 1
        assert talk.context.requests.statistics().taken == 1
        assert talk.conversation.intake.is_stopped, "so the client gets pongs"
        served.set()
        await settle()
        assert talk.context.requests.statistics().taken == 0
    assert set(talk.socket.replies()) == {1, 2}


async def test_padded_request_may_wait_and_is_no_reason_to_read_nothing(talk_of: TalkOf) -> None:
    talk = talk_of()
    begun = trio.Event()

    async def wait(*_: object) -> object:
        begun.set()
        await trio.sleep_forever()

    talk.play("job.wait", wait)
    async with talk.served_in_background():
        await talk.conversation.wait_for_room(LARGE_BYTES + 1)
        padded = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "job.wait", "params": {"id": 7}})
        talk.socket.say_text(padded + " " * LARGE_BYTES)
        talk.socket.say("service.hello", 2)
        await begun.wait()
        await settle()
        assert set(talk.socket.replies()) == {2}
        assert talk.context.requests.statistics().taken == 0


async def test_large_notification_is_served_without_a_reply(talk_of: TalkOf) -> None:
    talk = talk_of()
    begun = trio.Event()

    async def run(*_: object) -> object:
        begun.set()
        await trio.lowlevel.checkpoint()
        return m.RunResult(job=record(1))

    talk.play("job.run", run)
    async with talk.served_in_background():
        talk.socket.say("job.run", **LARGE_PLAN)
        await begun.wait()
        await settle()
    assert talk.socket.sent == []


@pytest.mark.parametrize(
    ("method", "params", "again"), [("job.list", {}, True), ("job.plan", PLAN, False)]
)
async def test_large_reply_waits_for_its_slot(
    talk_of: TalkOf, method: str, params: dict[str, object], *, again: bool
) -> None:
    """A reply that only reads is thrown away meanwhile, and made again."""
    talk = talk_of()
    talk.play(method, Encoded(json.dumps(LONG)))
    assert talk.context.replies.acquire_nowait(NAME)
    async with talk.served_in_background():
        talk.socket.say(method, 1, **params)
        await settle()
        assert talk.socket.sent == []
        assert talk.served == [method]
        talk.context.replies.release(NAME)
        await settle()
        assert talk.socket.replies()[1]["result"] == LONG
        assert talk.served == [method] * (2 if again else 1)
        assert talk.context.replies.statistics().taken == 0


async def test_reply_of_the_bound_needs_no_slot(talk_of: TalkOf) -> None:
    talk = talk_of()
    bare = len('{"jsonrpc":"2.0","id":1,"result":""}')
    talk.play("job.list", Encoded(json.dumps("x" * (LARGE_BYTES - bare))))
    assert talk.context.replies.acquire_nowait(NAME)
    async with talk.served_in_background():
        talk.socket.say("job.list", 1)
        await settle()
    assert [len(text) for text in talk.socket.sent] == [LARGE_BYTES]


async def test_slot_of_a_reply_that_is_not_taken_comes_free_with_the_end(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.play("job.list", Encoded(json.dumps(LONG)))
    talk.socket.takes = trio.Event()
    async with talk.served_in_background():
        talk.socket.say("job.list", 1)
        await settle()
        assert talk.context.replies.statistics().taken == 1
        talk.socket.close()
        await settle()
        assert talk.context.replies.statistics().taken == 0


# --- what ends a conversation ---------------------------------------------------------------


async def test_too_many_small_frames_end_the_conversation(
    talk_of: TalkOf, autojump_clock: trio.testing.MockClock
) -> None:
    talk = talk_of()
    talk.socket.small_frames = SMALL_FRAMES_BURST
    assert await talk.conversation.wait_for_room(1) > 0
    await trio.sleep(1)
    talk.socket.small_frames = SMALL_FRAMES_PER_SECOND
    assert await talk.conversation.wait_for_room(1) > 0
    talk.socket.small_frames = 1
    with trio.move_on_after(60) as bound:
        await talk.conversation.wait_for_room(1)
    assert bound.cancelled_caught, "nothing more is read"
    assert talk.reached() == {"too_many_frames"}
    await talk.conversation.serve()
    await talk.conversation.say_goodbye()
    assert talk.socket.closing[0][0] == 1013


async def test_large_message_that_comes_too_slowly_ends_the_conversation(
    talk_of: TalkOf, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def wait_for_room(_: ReadBackpressure, __: int) -> float:
        await trio.lowlevel.checkpoint()
        raise TooSlow("cannot wait")

    monkeypatch.setattr(ReadBackpressure, "wait_for_room", wait_for_room)
    talk = talk_of()
    with trio.move_on_after(60) as bound:
        await talk.conversation.wait_for_room(LARGE_BYTES + 1)
    assert bound.cancelled_caught
    assert talk.reached() == {"too_slow"}
    await talk.conversation.serve()


async def test_message_beyond_the_bound_counts_as_a_limit(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.socket.close(TOO_BIG)
    await talk.conversation.serve()
    assert talk.reached() == {"message_too_large"}
    other = talk_of()
    other.socket.close()
    await other.conversation.serve()
    assert other.reached() == set()


async def test_end_of_the_connection_cancels_calls_and_gives_all_back(
    talk_of: TalkOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, closed = talk_of(), list[str]()
    monkeypatch.setattr(Subscriptions, "close", lambda _: closed.append("subscriptions"))
    talk.hold("job.wait", Encoded("{}"))
    async with talk.served_in_background():
        await talk.conversation.wait_for_room(LARGE_BYTES + 1)
        talk.socket.say("job.wait", 1, id=7)
        await settle()
        assert talk.context.requests.statistics().taken == 1
        talk.socket.close()
        await settle()
        assert closed == ["subscriptions"]
        assert talk.context.requests.statistics().taken == 0
        assert not talk.conversation._calls
    assert talk.socket.sent == []


async def test_service_that_ends_first_sends_the_replies_that_it_owes(talk_of: TalkOf) -> None:
    talk = talk_of()
    ended = talk.hold("job.wait", Encoded("{}"))
    async with talk.served_in_background():
        talk.socket.say("job.wait", 1, id=7)
        await settle()
        talk.client.leaving.set()
        await settle()
        assert not talk.conversation._sender.scope.cancel_called
        ended.set()
        await settle()
        assert talk.conversation._sender.scope.cancel_called
    assert set(talk.socket.replies()) == {1}


async def test_dismissed_client_gets_nothing_more(talk_of: TalkOf) -> None:
    talk = talk_of()
    ended = talk.hold("job.wait", Encoded("{}"))
    async with talk.served_in_background():
        talk.socket.say("job.wait", 1, id=7)
        await settle()
        talk.client.dismiss("it is revoked")
        await settle()
        assert talk.conversation._sender.scope.cancel_called
        ended.set()
        await settle()
    assert talk.socket.sent == []


async def test_message_on_its_way_is_not_cut_off_by_a_dismissal(talk_of: TalkOf) -> None:
    talk = talk_of()
    talk.socket.takes = trio.Event()
    async with talk.served_in_background():
        talk.socket.say("service.hello", 1)
        await settle()
        talk.client.dismiss("it is revoked")
        await trio.testing.wait_all_tasks_blocked()
        assert talk.socket.cut_off == 0
        talk.socket.takes.set()
        await settle()
    assert set(talk.socket.replies()) == {1}


async def test_reply_that_is_being_sent_is_owed(
    talk_of: TalkOf, autojump_clock: trio.testing.MockClock
) -> None:
    talk = talk_of()
    talk.socket.takes = trio.Event()
    async with talk.served_in_background():
        talk.socket.say("service.hello", 1)
        await trio.sleep(1)
        talk.client.leaving.set()
        await trio.sleep(60)
        assert not talk.conversation._sender.scope.cancel_called
        talk.socket.takes.set()
        await trio.sleep(1)
        assert talk.conversation._sender.scope.cancel_called


async def test_end_does_not_wait_for_a_large_request(talk_of: TalkOf) -> None:
    talk, begun = talk_of(), trio.Event()

    async def plan(*_: object) -> object:
        begun.set()
        await trio.sleep_forever()

    talk.play("job.plan", plan)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk.conversation.serve)
        talk.socket.say("job.plan", 1, **LARGE_PLAN)
        await begun.wait()
        talk.conversation._sender.cancel()


async def test_long_request_is_refused_as_any_other_under_an_id_in_flight(
    talk_of: TalkOf,
) -> None:
    talk = talk_of()
    talk.hold("job.wait", Encoded("{}"))
    padded = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "job.wait", "params": {"id": 7}})
    async with talk.served_in_background():
        for _ in range(2):
            talk.socket.say_text(padded + " " * LARGE_BYTES)
        await until(lambda: bool(talk.socket.sent))
    assert "in flight" in talk.socket.replies()[1]["error"]["message"]
    assert talk.served == ["job.wait"]


async def test_client_that_sends_nonsense_counts_as_active(talk_of: TalkOf) -> None:
    talk = talk_of()
    async with talk.served_in_background():
        talk.socket.say_text("no JSON")
        await settle()
        assert talk.context.active_clients.has_others(())


async def test_client_that_asks_counts_as_active(talk_of: TalkOf) -> None:
    talk = talk_of()
    async with talk.served_in_background():
        await settle()
        assert not talk.context.active_clients.has_others(())
        talk.socket.say("service.hello", 1)
        await settle()
        assert talk.context.active_clients.has_others(())


# --- output ---------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize(
    ("method", "params"),
    [("job.log", {"id": 7}), ("job.run", PLAN), ("job.run", LARGE_PLAN)],
    ids=["log", "run", "large run"],
)
async def test_output_is_sent_after_the_reply_that_names_its_subscription(
    talk_of: TalkOf,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    params: dict[str, object],
    *,
    answered: bool,
) -> None:
    talk, sent = talk_of(), trio.Event()

    async def deliver(
        _: Subscriptions, number: int, send: Callable[[str], Awaitable[None]]
    ) -> None:
        await send(json.dumps({"output of": number}))
        sent.set()

    monkeypatch.setattr(Subscriptions, "run", deliver)
    log, run = m.LogResult(subscription=3, offset=0), m.RunResult(job=record(7), subscription=3)
    talk.play(method, log if method == "job.log" else run)
    async with talk.served_in_background():
        talk.socket.say(method, 1 if answered else None, **params)
        await sent.wait()
    *replies, output = map(json.loads, talk.socket.sent)
    assert output == {"output of": 3}
    assert [reply["id"] for reply in replies] == ([1] if answered else [])


async def test_service_that_ends_first_sends_output_whose_end_is_known(
    talk_of: TalkOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, owe, end = talk_of(), [True], trio.Event()

    async def deliver(*_: object) -> None:
        await end.wait()
        owe.clear()

    monkeypatch.setattr(Subscriptions, "run", deliver)
    monkeypatch.setattr(Subscriptions, "owe", property(lambda _: bool(owe)))
    talk.play("job.log", m.LogResult(subscription=1, offset=0))
    async with talk.served_in_background():
        talk.socket.say("job.log", 1, id=7)
        await settle()
        talk.client.leaving.set()
        await settle()
        assert not talk.conversation._sender.scope.cancel_called
        end.set()
        await settle()
        assert talk.conversation._sender.scope.cancel_called


async def test_call_that_opened_nothing_sends_no_output(
    talk_of: TalkOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deliver(*_: object) -> None:
        pytest.fail("there is no subscription")

    monkeypatch.setattr(Subscriptions, "run", deliver)
    talk = talk_of()
    talk.play("job.run", m.RunResult(job=record(JobId(7))))
    talk.play("job.log", InvalidParams("cannot follow the job"))
    async with talk.served_in_background():
        talk.socket.say("job.run", 1, **PLAN)
        talk.socket.say("job.log", 2, id=7)
        await settle()
    assert set(talk.socket.replies()) == {1, 2}
