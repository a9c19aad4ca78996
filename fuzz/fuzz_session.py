"""A client and a server that talk, with messages that are reordered, repeated and dropped.

Each pair of bytes of an input is a step and what it is about. Whatever the order, a reply reaches
its own call and no other, and what comes twice or out of nowhere is an error of ours.
"""

import sys

try:
    import atheris
except ImportError:  # the seeds and their mutations run without it, see tests/unit/test_fuzz.py
    atheris = None

if atheris is not None:
    with atheris.instrument_imports():
        from jobworker.errors import NotFound, ProtocolError
        from jobworker.protocol import messages as m
        from jobworker.protocol.session import ClientSession, Reply, RpcRequest, ServerSession
else:
    from jobworker.errors import NotFound, ProtocolError
    from jobworker.protocol import messages as m
    from jobworker.protocol.session import ClientSession, Reply, RpcRequest, ServerSession


def one(data: bytes) -> None:
    """Try one input; raises what must never be raised."""
    client, server = ClientSession(), ServerSession(8)
    to_server: list[str] = []
    to_client: list[str] = []
    calls: list[RpcRequest] = []
    open_ids: set[object] = set()
    for step, about in zip(data[::2], data[1::2], strict=False):
        match step % 6:
            case 0:
                id_, message = client.call("service.hello", m.Nothing())
                open_ids.add(id_)
                to_server.append(message)
            case 1 if to_server:
                received = server.receive(to_server.pop(about % len(to_server)))
                if isinstance(received, RpcRequest):
                    calls.append(received)
                elif received.message is not None:
                    to_client.append(received.message)
            case 2 if calls:
                call = calls.pop(about % len(calls))
                welcome = m.Welcome(version="1", name=str(call.id), role="admin")
                to_client.append(server.result(call.id, welcome))
            case 3 if calls:
                call = calls.pop(about % len(calls))
                to_client.append(server.error(call.id, NotFound(str(call.id))))
            case 4 if to_client:
                message = to_client[about % len(to_client)]
                if about < 128:  # else it stays, and comes again
                    to_client.remove(message)
                _receive(client, message, open_ids)
            case 5:
                if to_server and about % 2:
                    to_server.append(to_server[about % len(to_server)])  # sent twice
                elif to_client:
                    del to_client[about % len(to_client)]


def _receive(client: ClientSession, message: str, open_ids: set[object]) -> None:
    try:
        received = client.receive(message)
    except ProtocolError:
        return
    assert isinstance(received, Reply)
    assert received.id in open_ids, "a call was answered twice"
    open_ids.discard(received.id)
    if received.error is None:
        assert isinstance(received.result, m.Welcome)
        assert received.result.name == str(received.id)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
