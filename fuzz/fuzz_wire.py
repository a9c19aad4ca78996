"""What strangers may send: messages through both sides' decoders, as text and as bytes.

Whatever comes, the server answers with a call within the bounds of its method or a refusal that
can be sent, and the client with an event or an error of ours. The bytes of an input are a message
each, cut at its NUL bytes.
"""

import json
import sys
from contextlib import suppress

try:
    import atheris
except ImportError:  # the seeds and their mutations run without it, see tests/unit/test_fuzz.py
    atheris = None

if atheris is not None:
    with atheris.instrument_imports():
        from jobworker.errors import JobworkerError
        from jobworker.protocol import messages as m
        from jobworker.protocol.session import ClientSession, RpcRequest, ServerSession
else:
    from jobworker.errors import JobworkerError
    from jobworker.protocol import messages as m
    from jobworker.protocol.session import ClientSession, RpcRequest, ServerSession

MAX_REFUSAL_BYTES = 20_000


def one(data: bytes) -> None:
    """Try one input; raises what must never be raised."""
    server, client = ServerSession(3), ClientSession()
    for name in ("service.hello", "job.list", "job.log"):
        client.call(name, m.Nothing())
    for part in data.split(b"\0"):
        text = part.decode("utf-8", "surrogatepass") if _decodes(part) else part.decode("latin-1")
        for message in (text, part):
            _ask(server, message)
            with suppress(JobworkerError):
                client.receive(message)


def _decodes(part: bytes) -> bool:
    try:
        part.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def _ask(server: ServerSession, message: str | bytes) -> None:
    received = server.receive(message)
    if isinstance(received, RpcRequest):
        assert isinstance(received.params, received.method.params)
        assert received.answered or received.id is None
        json.loads(server.result(received.id, m.Nothing()).encode())
    elif received.message is not None:
        sent = received.message.encode()  # no lone surrogate
        assert len(sent) <= MAX_REFUSAL_BYTES
        body = json.loads(sent)
        assert set(body) == {"jsonrpc", "id", "error"}
        assert body["error"]["code"] == received.error.code


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
