"""The launcher's end of its connection to a service that may be killed at any instant."""

import os
import socket

from jobworker.sandbox import channel
from jobworker.sandbox.event_loop import Turns
from jobworker.sandbox.launcher.service_connection import ServiceLink
from jobworker.sandbox.protocol import requests


def test_last_words_of_a_service_that_was_killed_are_heard() -> None:
    """All of them, though it has left something unread, and no reply reaches it any more."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    turns, heard, lost = Turns(), list[int](), list[str]()

    def serve(number: int, _: requests.Request) -> None:
        heard.append(number)
        link.send({"id": number, "ok": {}})

    def on_lost(why: str, descriptors: list[int]) -> None:
        lost.append(why)
        for descriptor in descriptors:
            os.close(descriptor)

    link = ServiceLink(near, turns, serve, on_lost)
    link.send({"event": "exit", "job": 7})
    for number in range(1, 4):
        channel.send(far, {"id": number, "op": "ping"})
    far.close()
    for _ in range(10):
        if not lost:
            turns.turn()
    assert heard == [1, 2, 3]
    assert lost == [""]
