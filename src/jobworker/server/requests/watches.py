"""Tasks of a conversation that end it if the client is silent or too slow, and `show_life`.

Each function but `show_life` gets `end`, which ends the conversation with an error.
"""

from collections.abc import Callable
from contextlib import suppress

import trio
from trio_websocket import ConnectionClosed

from jobworker.config.limits import ConnectionLimits
from jobworker.errors import JobworkerError, PingUnanswered, SendStalled, TooSlow
from jobworker.model.units import parse_duration
from jobworker.server.connections.framed_socket import FramedSocket
from jobworker.server.fairness.slots import LEAST_BYTES_PER_SECOND, LOOK_SECONDS, Slots
from jobworker.server.requests.read_backpressure import ReadBackpressure

End = Callable[[JobworkerError], None]

LIFE_SECONDS = 10.0
"""Less than any client should wait for a sign of life (docs/protocol.md, Silence)."""
SERVE_SECONDS = 60.0
"""How long a large request may take beyond `stall_seconds`; a job starts within seconds."""


async def end_unless_served(served: trio.Event, stall_seconds: float, end: End) -> None:
    """End the conversation if a large request is not served in time.

    The server cannot serve it while the client takes no replies.
    """
    seconds = stall_seconds + SERVE_SECONDS
    with trio.move_on_after(seconds):
        await served.wait()
        return
    end(TooSlow(f"cannot go on: a large request was not served in {seconds:g} s"))


async def end_unless_taken(
    socket: FramedSocket, slots: Slots, name: str, stall_seconds: float, end: End
) -> None:
    """End the conversation if the client takes a large reply too slowly and others wait.

    The client, of this name, has a grace of `stall_seconds`, and one second more for each
    `LEAST_BYTES_PER_SECOND` bytes that it has taken.
    """
    with suppress(trio.ClosedResourceError):  # then the connection has ended
        began, before = trio.current_time(), socket.taken_bytes
        left = stall_seconds
        while left > 0 or not slots.are_wanted_of(name):
            await trio.sleep(left if left > 0 else LOOK_SECONDS)
            earned = (socket.taken_bytes - before) / LEAST_BYTES_PER_SECOND
            left = stall_seconds + earned - (trio.current_time() - began)
        end(
            SendStalled(
                f"cannot send a large reply: others wait, and after {stall_seconds:g} s the client "
                f"took less than {LEAST_BYTES_PER_SECOND} bytes a second"
            )
        )


async def show_life(socket: FramedSocket, intake: ReadBackpressure) -> None:
    """Send a pong of our own at intervals while the server does not come to the next message.

    Meanwhile it answers no ping behind that message, so a client that waits for its turn, or for
    room for its calls, would take the server for one that stands still. RFC 6455, section 5.5.3,
    allows such a pong. The first one comes within two intervals: a stretch may begin within one.
    """
    while True:
        await intake.wait_for_stop()
        stretch = intake.stretches
        await trio.sleep(LIFE_SECONDS)
        if intake.is_stopped and intake.stretches == stretch:
            with suppress(ConnectionClosed):
                await socket.pong()


async def ping(
    socket: FramedSocket, intake: ReadBackpressure, limits: ConnectionLimits, end: End
) -> None:
    """Ping the client at intervals; end the conversation if it shows no sign of life.

    Messages on their way come before a ping, which may take long on a slow line. So the bytes that
    the client takes are a sign of life too.
    """
    interval, timeout = (
        parse_duration(limits.ping_interval),
        parse_duration(limits.ping_timeout),
    )
    while interval:
        await trio.sleep(interval)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_in_silence, socket, intake, timeout, end)
            await socket.ping()
            nursery.cancel_scope.cancel()


async def _end_in_silence(
    socket: FramedSocket, intake: ReadBackpressure, seconds: float, end: End
) -> None:
    """End the conversation if the client takes no byte for that long, the ping included.

    While the reader is paused this goes on waiting: the client's answer may be among the bytes that
    were not read yet.
    """
    before, now = None, (socket.taken_bytes, intake.pauses)
    while now != before or intake.paused:
        await trio.sleep(seconds)
        before, now = now, (socket.taken_bytes, intake.pauses)
    end(PingUnanswered(f"cannot go on: a ping was not answered in {seconds:g} s"))
