"""The sender: each message whole or not at all, and a closing frame that says why."""

import pytest
import trio
import trio.testing
from trio_websocket import CloseReason, ConnectionClosed

from jobworker.errors import PingUnanswered, SendStalled
from jobworker.protocol.frames import MAX_REASON_BYTES, frame_text
from jobworker.server.access.connected_clients import ConnectedClient
from jobworker.server.fairness.connection_limiter import ConnectionLimiter
from jobworker.server.reporting.counters import LIMITS_REACHED
from jobworker.server.requests.sending import DISMISSAL_SECONDS, Sender

from .played_socket import PlayedSocket, client

STALLED = SendStalled("cannot send: the client took nothing")


class Sending:
    """A sender, its socket and its client."""

    def __init__(self) -> None:
        self.socket, self.client = PlayedSocket(), client()
        self.limiter = ConnectionLimiter()
        self.sender = Sender(self.socket.framed, self.client, self.limiter)

    def reached(self) -> dict[str, int]:
        """The limits that the client has reached."""
        counted = self.limiter.counters.statistics()
        return {labels[0]: n for (name, *labels), n in counted.items() if name == LIMITS_REACHED}


@pytest.fixture
def sending() -> Sending:
    return Sending()


async def is_stuck(sending: Sending, message: str = "more") -> bool:
    """Whether a send neither returns nor fails."""
    with trio.move_on_after(60) as bound:
        await sending.sender.send(message)
    return bound.cancelled_caught


async def test_message_or_several_frames_go_in_their_order(sending: Sending) -> None:
    await sending.sender.send("one")
    await sending.sender.send([frame_text("two"), frame_text("three")])
    assert sending.socket.sent == ["one", "two", "three"]


async def test_cancelled_task_sends_its_message_whole(sending: Sending) -> None:
    """The end of a subscription must not break the stream of the connection."""
    sending.socket.takes = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending.sender.send, "whole")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        await trio.lowlevel.cancel_shielded_checkpoint()
        assert sending.socket.sent == []
        sending.socket.takes.set()
    assert sending.socket.sent == ["whole"]
    assert sending.socket.cut_off == 0


async def test_cancelled_task_goes_no_further_than_its_message(sending: Sending) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await sending.sender.send("whole")
        pytest.fail("it goes on")
    assert sending.socket.sent == ["whole"]


async def test_client_that_takes_nothing_ends_the_conversation(
    sending: Sending, autojump_clock: object
) -> None:
    sending.socket.fault = STALLED
    assert await is_stuck(sending)
    assert sending.sender.scope.cancel_called
    assert sending.reached() == {"send_stalled": 1}
    assert await sending.sender.say_goodbye()
    assert sending.socket.closing == [(1013, f"send_stalled: {STALLED.message}")]


@pytest.mark.parametrize(
    "fault",
    [
        trio.BrokenResourceError(),
        trio.ClosedResourceError(),
        ConnectionClosed(CloseReason(1000, "")),
    ],
    ids=lambda fault: type(fault).__name__,
)
async def test_broken_connection_ends_the_conversation_and_is_no_limit(
    sending: Sending, autojump_clock: object, fault: Exception
) -> None:
    sending.socket.fault = fault
    assert await is_stuck(sending)
    assert sending.sender.scope.cancel_called
    assert sending.reached() == {}


async def test_end_of_the_conversation_cuts_off_what_is_being_sent(
    sending: Sending, autojump_clock: object
) -> None:
    sending.socket.takes = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(is_stuck, sending)
        await trio.testing.wait_all_tasks_blocked()
        sending.sender.end(PingUnanswered("cannot go on"))
        await trio.testing.wait_all_tasks_blocked()
        assert sending.socket.cut_off == 1
    assert sending.sender.scope.cancel_called


async def test_only_the_first_fault_counts(sending: Sending) -> None:
    sending.sender.end(PingUnanswered("cannot go on"))
    sending.sender.end(STALLED)
    assert sending.reached() == {"ping_unanswered": 1}
    await sending.sender.say_goodbye()
    assert sending.socket.closing == [(1013, "ping_unanswered: cannot go on")]


async def test_after_the_stop_nothing_is_sent(sending: Sending, autojump_clock: object) -> None:
    sending.socket.takes = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(is_stuck, sending, "first")
        await trio.testing.wait_all_tasks_blocked()
        sending.sender.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert sending.socket.cut_off == 1
        sending.socket.takes.set()
        assert await is_stuck(sending, "second")
    assert sending.socket.sent == []
    assert not sending.sender.scope.cancel_called


async def test_messages_on_their_way_are_taken_before_the_end_and_no_later_one(
    sending: Sending, autojump_clock: object
) -> None:
    sending.socket.takes, began = trio.Event(), trio.current_time()
    ends = list[float]()

    async def finish() -> None:
        await sending.sender.finish()
        ends.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending.sender.send, "first")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(finish)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(is_stuck, sending, "second")
        await trio.testing.wait_all_tasks_blocked()
        assert not ends
        sending.socket.takes.set()
    assert sending.socket.sent == ["first"]
    assert ends == [began], "it waits no longer than it must"


async def test_end_waits_only_moments_for_a_client_that_takes_nothing(
    sending: Sending, autojump_clock: object
) -> None:
    began = trio.current_time()
    await sending.sender.finish()
    assert trio.current_time() == began, "nothing is being sent"
    sending.sender, sending.socket.takes = Sending().sender, trio.Event()
    sending.sender._socket = sending.socket.framed
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending.sender.send, "first")
        await trio.testing.wait_all_tasks_blocked()
        await sending.sender.finish()
        assert trio.current_time() - began == pytest.approx(DISMISSAL_SECONDS)
        assert sending.socket.cut_off == 0, "it may still be taken whole"
        sending.sender.cancel()
        nursery.cancel_scope.cancel()


async def test_end_waits_for_the_last_of_several_messages(
    sending: Sending, autojump_clock: object
) -> None:
    quick, slow = PlayedSocket(), PlayedSocket()
    quick.takes, slow.takes = trio.Event(), trio.Event()
    done = list[str]()
    async with trio.open_nursery() as nursery:
        for socket in (quick, slow):
            sending.sender._socket = socket.framed
            nursery.start_soon(sending.sender.send, "message")
            await trio.testing.wait_all_tasks_blocked()

        async def finish() -> None:
            await sending.sender.finish()
            done.append("finished")

        nursery.start_soon(finish)
        await trio.testing.wait_all_tasks_blocked()
        quick.takes.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        slow.takes.set()
        await trio.testing.wait_all_tasks_blocked()
        assert done


@pytest.mark.parametrize(
    ("reason", "closing"),
    [
        ("", (1001, "shutting_down: the service ends; connect again")),
        ("it is revoked", (1008, "certificate_refused: it is revoked")),
    ],
)
async def test_closing_frame_says_why_and_whether_to_come_again(
    sending: Sending, reason: str, closing: tuple[int, str]
) -> None:
    sending.client.reason = reason
    assert await sending.sender.say_goodbye()
    assert sending.socket.closing == [closing]


async def test_fault_is_told_before_what_is_wrong_with_the_certificate(sending: Sending) -> None:
    sending.client.reason = "it is revoked"
    sending.sender.end(STALLED)
    await sending.sender.say_goodbye()
    assert sending.socket.closing == [(1013, f"send_stalled: {STALLED.message}")]


async def test_long_reason_is_cut_between_characters(sending: Sending) -> None:
    prefix = "certificate_refused: "
    sending.client.reason = "ä" * MAX_REASON_BYTES
    await sending.sender.say_goodbye()
    ((_, told),) = sending.socket.closing
    assert told == prefix + "ä" * ((MAX_REASON_BYTES - len(prefix)) // 2)


async def test_who_closed_first_gets_no_frame(sending: Sending) -> None:
    sending.socket.closed = CloseReason(1000, "")
    assert not await sending.sender.say_goodbye()
    assert sending.socket.closing == []


async def test_goodbye_waits_only_moments_for_its_answer_even_if_cancelled(
    sending: Sending, autojump_clock: object
) -> None:
    sending.socket.answers_closing = False
    began = trio.current_time()
    with trio.CancelScope() as scope:
        scope.cancel()
        assert not await sending.sender.say_goodbye()
    assert trio.current_time() - began == pytest.approx(DISMISSAL_SECONDS)
    assert len(sending.socket.closing) == 1


def test_limit_names_the_client(sending: Sending, caplog: pytest.LogCaptureFixture) -> None:
    connected: ConnectedClient = sending.client

    async def record() -> None:
        await trio.lowlevel.checkpoint()
        sending.sender.record_limit(STALLED)

    with caplog.at_level("INFO"):
        trio.run(record)
    assert f"{connected.peer} ({connected.identity.common_name}): send_stalled" in caplog.text
