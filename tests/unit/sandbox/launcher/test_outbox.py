"""Messages to a slow reader, where the sender has no descriptor left."""

import errno
import os
import resource
import socket

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.launcher.outbox import Outbox

from ....descriptors import descriptors

LARGE: channel.Message = {"id": 7, "ok": {"steps": "x" * (2 * channel.MAX_INLINE_BYTES)}}


@pytest.mark.parametrize("kept", [False, True])
def test_large_reply_without_a_descriptor_is_refused_and_others_follow(kept: bool) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    outbox, before = Outbox(near), resource.getrlimit(resource.RLIMIT_NOFILE)
    early = 0
    with near, far:
        while kept and not outbox.waiting:
            early += 1
            outbox.send({"id": 0}, ())
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            outbox.send(LARGE, ())
            outbox.send({"id": 8, "ok": {}}, ())
            for _ in range(early):
                assert channel.receive(far) == ({"id": 0}, [])
                outbox.flush()
            refusal, last = channel.receive(far), channel.receive(far)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert refusal is not None
    error = refusal[0]["error"]
    assert isinstance(error, dict)
    assert (refusal[0]["id"], error["errno"]) == (7, errno.EMFILE)
    assert last == ({"id": 8, "ok": {}}, [])


def test_message_that_cannot_be_kept_leaves_no_descriptor() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    outbox, before = Outbox(near), resource.getrlimit(resource.RLIMIT_NOFILE)
    with near, far:
        while not outbox.waiting:
            outbox.send({"id": 0}, ())
        opened = descriptors()
        first_free = os.dup(0)
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 1, before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                outbox.send({"id": 1}, [near.fileno(), far.fileno()])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert descriptors() == opened
        outbox.close()
