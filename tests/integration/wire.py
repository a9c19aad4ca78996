"""A client of the tests' own: what the protocol's page says and no more, over trio-websocket.

It shares no code with `jobworker.client`, so that a fault of one cannot hide in the other.
"""

import base64
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio_websocket
import wsproto.utilities

from jobworker.cli.worker.embedded_service import EmbeddedService

Json = dict[str, object]


class Refused(Exception):
    """An error object."""

    def __init__(self, error: Json) -> None:
        super().__init__(error["message"])
        self.code, self.data = error["code"], error.get("data")
        self.message = str(error["message"])


class Wire:
    """One connection; calls may overlap."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self.socket = socket
        self._calls = 0
        self._replies: dict[int, trio.MemorySendChannel[Json]] = {}
        self._notes: dict[object, trio.MemorySendChannel[Json]] = {}
        self._early: dict[object, list[Json]] = {}

    async def read(self) -> None:
        """Hand out what the server sends."""
        try:
            while True:
                message = json.loads(await self.socket.get_message())
                if "method" in message:
                    number = message["params"]["subscription"]
                    if number in self._notes:
                        self._notes[number].send_nowait(message)
                    else:
                        self._early.setdefault(number, []).append(message)
                else:
                    self._replies.pop(message["id"]).send_nowait(message)
        except trio_websocket.ConnectionClosed:
            for waiting in (*self._replies.values(), *self._notes.values()):
                waiting.close()

    async def call(self, method: str, /, **params: object) -> Json:
        """Call and wait for the result; raises Refused."""
        self._calls += 1
        send, receive = trio.open_memory_channel[Json](1)
        self._replies[self._calls] = send
        request = {"jsonrpc": "2.0", "id": self._calls, "method": method, "params": params}
        await self.socket.send_message(json.dumps(request))
        reply = await receive.receive()
        error = reply.get("error")
        if isinstance(error, dict):
            raise Refused(error)
        result = reply["result"]
        assert isinstance(result, dict)
        return result

    async def notify(self, method: str, /, **params: object) -> None:
        """Send a notification."""
        await self.socket.send_message(
            json.dumps({"jsonrpc": "2.0", "method": method, "params": params})
        )

    def notes(self, subscription: object) -> trio.MemoryReceiveChannel[Json]:
        """The notifications of a subscription, those that have come already included."""
        send, receive = trio.open_memory_channel[Json](1_000_000)
        self._notes[subscription] = send
        for message in self._early.pop(subscription, []):
            send.send_nowait(message)
        return receive

    async def output(self, subscription: object) -> tuple[bytes, bytes, Json]:
        """Standard output, standard error, and the final job, of a subscription."""
        streams = {"stdout": bytearray(), "stderr": bytearray()}
        offset = None
        async for message in self.notes(subscription):
            params = message["params"]
            assert isinstance(params, dict)
            if message["method"] == "job.output_end":
                assert params["error"] is None, params["error"]
                return bytes(streams["stdout"]), bytes(streams["stderr"]), params["job"]
            data = base64.b64decode(params["data"])
            assert offset is None or params["offset"] == offset, "a gap or a repeat"
            offset = params["offset"] + len(data)
            streams[params["stream"]] += data
        raise AssertionError("the subscription ended without a word")

    async def run(self, *command: str, **spec: object) -> tuple[str, str, Json]:
        """Run a command to its end: its output, and the job."""
        job = {"command": list(command), **spec}
        result = await self.call("job.run", job=job, follow={})
        out, err, record = await self.output(result["subscription"])
        return out.decode(errors="replace"), err.decode(errors="replace"), record

    async def start(self, *command: str, **spec: object) -> int:
        """Start a command: the job's id."""
        result = await self.call("job.run", job={"command": list(command), **spec})
        job = result["job"]
        assert isinstance(job, dict)
        return int(job["id"])


def context_for(service: EmbeddedService, role: str = "admin") -> ssl.SSLContext:
    """A context made by the standard library alone."""
    names = service.environment(role)
    context = ssl.create_default_context(cafile=names["WORKER_CA_PATH"])
    context.load_cert_chain(names["WORKER_CERT_PATH"], names["WORKER_KEY_PATH"])
    return context


@asynccontextmanager
async def open_socket(
    service: EmbeddedService, role: str = "admin", context: ssl.SSLContext | None = None
) -> AsyncIterator[trio_websocket.WebSocketConnection]:
    """Connect with the certificate of `role`; the socket is closed whatever happens."""
    host, port = service.address.rsplit(":", 1)
    stream = await trio.open_ssl_over_tcp_stream(
        host,
        int(port),
        ssl_context=context or context_for(service, role),
        https_compatible=True,
    )
    try:
        async with trio.open_nursery() as nursery:
            socket = await trio_websocket.wrap_client_stream(
                nursery,
                stream,
                service.address,
                "/",
                subprotocols=["jobworker.v1"],
                message_queue_size=64,
                max_message_size=8 << 20,
                receive_buffer_size=65_536,
            )
            yield socket
            await socket.aclose()
            nursery.cancel_scope.cancel()
    except* wsproto.utilities.LocalProtocolError:
        pass  # trio-websocket's reader answers a ping behind its own closing frame
    finally:
        await trio.aclose_forcefully(stream)


@asynccontextmanager
async def open_wire(service: EmbeddedService, role: str = "admin") -> AsyncIterator[Wire]:
    """Connect, and read what comes."""
    async with open_socket(service, role) as socket:
        wire = Wire(socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.read)
            yield wire
            await socket.aclose()
            nursery.cancel_scope.cancel()
