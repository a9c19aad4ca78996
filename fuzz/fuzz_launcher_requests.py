"""What a hostile service may send to the launcher: packets through its decoder and its parser.

The launcher has root's rights, and its client faces the network. So whatever comes, it is refused
by ProtocolError or it is a request within the bounds that the launcher itself would choose; and
nothing that the packet carried stays open but what `channel.BadMessage` names.

The first byte of an input chooses how the packet travels, the rest is the packet.
"""

import os
import sys

try:
    import atheris
except ImportError:  # the seeds and their mutations run without it, see tests/unit/test_fuzz.py
    atheris = None

if atheris is not None:
    with atheris.instrument_imports():
        from jobworker.errors import ProtocolError
        from jobworker.sandbox import channel
        from jobworker.sandbox.protocol import operations, requests
else:
    from jobworker.errors import ProtocolError
    from jobworker.sandbox import channel
    from jobworker.sandbox.protocol import operations, requests

_SEALED, _UNSEALED, _CUT = 1, 2, 4


def one(data: bytes) -> None:
    """Try one input; raises what must never be raised."""
    how, packet = (data[0], data[1:]) if data else (0, b"")
    ancillary: channel.Ancillary = []
    carried: list[int] = []
    if how & (_SEALED | _UNSEALED):
        carried.append(_memory(packet, sealed=bool(how & _SEALED)))
        rights = carried[0].to_bytes(4, sys.byteorder)
        ancillary = [(channel.socket.SOL_SOCKET, channel.socket.SCM_RIGHTS, rights)]
        packet = b"a"
    flags = channel.socket.MSG_TRUNC if how & _CUT else 0
    owned: list[int] = []
    try:
        message, owned = channel.decode(packet, ancillary, flags)
        carried = []
        number, request = operations.parse(message)
    except channel.BadMessage as bad:
        owned, carried = bad.descriptors, []
        return
    except ProtocolError:
        return
    finally:
        channel.close_all([*owned, *carried])
    _check(number, request)


def _memory(body: bytes, *, sealed: bool) -> int:
    memory = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memory, body)
    if sealed:
        channel.fcntl.fcntl(memory, channel.fcntl.F_ADD_SEALS, channel._SEALS)
    return memory


def _check(number: int, request: requests.Request) -> None:
    """Hold a parsed request against what the launcher acts upon without another look."""
    assert 0 <= number <= requests.MAX_NUMBER
    assert type(number) is int
    job = getattr(request, "job", None)
    assert job is None or (type(job) is int and 0 <= job <= requests.MAX_NUMBER)
    if isinstance(request, requests.Signal):
        assert 1 <= request.number <= requests.MAX_SIGNAL
    if isinstance(request, requests.MakeVolume | requests.RemoveVolume):
        assert "/" not in request.name
        assert request.name[0].isalnum()
    if isinstance(request, requests.Spawn | requests.PlanOf):
        order = request.order
        assert all("/" not in name and place[0] == "/" for name, place in order.volumes)
        *numbers, cores = request.limits
        assert all(type(value) is int and value >= 0 for value in numbers)
        assert set(cores) <= set("0123456789,-")
        texts = [*order.arguments, *order.environment, *order.environment.values()]
        assert all("\0" not in text for text in texts)
        assert sum(len(text.encode()) for text in texts) <= requests.MAX_ORDER_BYTES
        assert order.arguments[0]
        assert all(name and "=" not in name for name in order.environment)
        assert not order.workdir or order.workdir.startswith("/")
        assert 1 <= len(order.hostname.encode()) <= 63


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
