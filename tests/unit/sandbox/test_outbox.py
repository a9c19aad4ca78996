"""Messages to a slow reader, where the sender has no descriptor left."""

import errno
import resource
import socket

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.outbox import Outbox

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
