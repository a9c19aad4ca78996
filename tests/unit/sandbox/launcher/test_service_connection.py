"""The launcher's end of its connection to a service that may be killed at any instant."""

import os
import socket

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher import outbox
from jobworker.sandbox.launcher.service_connection import ServiceConnection
from jobworker.sandbox.protocol import requests


def test_last_words_of_a_service_that_was_killed_are_heard() -> None:
    """All of them, though it has left something unread, and no reply reaches it any more."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    event_loop, heard, lost = EventLoop(), list[int](), list[str]()

    def serve(number: int, _: requests.Request) -> None:
        heard.append(number)
        link.send({"id": number, "ok": {}})

    def on_lost(why: str, descriptors: list[int]) -> None:
        lost.append(why)
        for descriptor in descriptors:
            os.close(descriptor)

    link = ServiceConnection(near, event_loop, serve, on_lost)
    link.send({"event": "exit", "job": 7})
    for number in range(1, 4):
        channel.send(far, {"id": number, "op": "ping"})
    far.close()
    for _ in range(10):
        if not lost:
            event_loop.run_once()
    assert heard == [1, 2, 3]
    assert lost == [""]


@pytest.mark.parametrize(("descriptors", "size"), [(0, 20_000), (4, 10)])
def test_service_that_takes_no_replies_has_its_requests_left_in_its_socket(
    descriptors: int, size: int
) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setblocking(False)
    event_loop, heard = EventLoop(), list[int]()
    null = os.open(os.devnull, os.O_RDONLY)

    def serve(number: int, _: requests.Request) -> None:
        heard.append(number)
        link.send({"id": number, "ok": "x" * size}, [null] * descriptors)

    link = ServiceConnection(near, event_loop, serve, lambda _, left: channel.close_all(left))
    sent = taken = 0
    while sent < 3000 and sent - len(heard) < 100:
        try:
            channel.send(far, {"id": sent + 1, "op": "ping"})
            sent += 1
        except BlockingIOError:
            break
        event_loop.call_later(0, list[int]().clear)  # so that a turn without a request ends
        event_loop.run_once()
    assert sent > len(heard), "the rest waits in the socket"
    assert link._outbox._bytes < outbox.ENOUGH_BYTES + size + 100
    kept = [one for each in link._outbox._unsent for one in each.descriptors]
    assert len(kept) < outbox.ENOUGH_DESCRIPTORS + descriptors
    alarm = list[int]().clear
    event_loop.call_later(0.05, alarm)
    event_loop.run_once()
    assert not event_loop.is_scheduled(alarm), "nobody is called meanwhile"
    while taken < sent:
        try:
            received = channel.receive(far)
        except BlockingIOError:
            event_loop.run_once()
            continue
        assert received is not None
        channel.close_all(received[1])
        taken += 1
    assert heard == list(range(1, sent + 1))
    for one in kept:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(one)
    far.close()
    event_loop.run_once()
    os.close(null)


def test_requests_are_heard_though_replies_wait_that_nobody_will_take() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    event_loop, heard, lost = EventLoop(), list[int](), list[str]()

    def serve(number: int, _: requests.Request) -> None:
        heard.append(number)

    def on_lost(why: str, left: list[int]) -> None:
        lost.append(why)
        channel.close_all(left)

    link = ServiceConnection(near, event_loop, serve, on_lost)
    while not link._outbox.is_full:
        link.send({"event": "x" * 20_000})
    channel.send(far, {"id": 7, "op": "ping"})
    far.close()
    while not lost:
        event_loop.run_once()
    assert heard == [7]


def test_no_request_is_taken_while_too_much_waits_though_some_of_it_was_sent() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    event_loop, heard = EventLoop(), list[int]()
    link = ServiceConnection(
        near,
        event_loop,
        lambda number, _: heard.append(number),
        lambda _, left: channel.close_all(left),
    )
    while link._outbox._bytes < 2 * outbox.ENOUGH_BYTES:
        link.send({"event": "x" * 20_000})
    channel.send(far, {"id": 7, "op": "ping"})
    while link._outbox.is_full:
        assert heard == []
        channel.receive(far)
        event_loop.call_later(0, list[int]().clear)
        event_loop.run_once()
    while not heard:
        channel.receive(far)
        event_loop.run_once()
    far.close()
    event_loop.run_once()
