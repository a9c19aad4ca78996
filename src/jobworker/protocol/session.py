"""This service's dialect of JSON-RPC 2.0, sans-IO: messages in, events and messages out.

One message is one JSON-RPC object, in a WebSocket text message; output may be in binary messages
instead (`Encoding.BINARY`). The standard leaves some points open, and here they are so:

- parameters are objects, never lists; an absent `params` is an empty object;
- an id is a printable string of up to 128 characters, a number within 64 bits or null, and not the
  id of another request in flight; the standard advises against fractions and null but allows
  them, so they are accepted;
- a notification gets no reply, also if its method does not exist or its parameters are invalid; a
  message that is not a request gets an error with id null, as the standard demands;
- a batch is refused as one invalid request: replies are sent in the order in which they are ready,
  so a batch would gain nothing;
- unknown members of a request are refused, and unknown parameters too.

The two sides share only these rules. No clock and no socket: the caller executes the calls and
decides when it replies.
"""

import base64
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TypeVar

from attrs import define, field, frozen

from jobworker.errors import (
    InternalError,
    InvalidParams,
    JobworkerError,
    ProtocolError,
    TooManyRequests,
    UnknownMethod,
    error_from_wire,
)
from jobworker.model.job import Stream
from jobworker.protocol.frames import Frame, frame_binary
from jobworker.protocol.messages import OutputEnd, OutputHeader
from jobworker.protocol.methods import METHODS, OUTPUT, OUTPUT_END, Method
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads, takes_long

T = TypeVar("T")

MAX_IN_FLIGHT = 128
MAX_ID_LENGTH = 128
MAX_HEADER_BYTES = 4096

_HEADER_TYPES = {"subscription": int, "stream": str, "offset": int, "time": str}

CallId = str | int | float | None


@frozen
class RpcRequest:
    """A valid request or notification."""

    id: CallId
    method: Method
    params: object
    """An instance of `method.params`."""
    answered: bool = True
    """False for a notification, which never gets a reply."""


@frozen
class InvalidRequest:
    """The refusal of an invalid request, with the message to send back at once."""

    message: str | None
    """The reply; None for a notification."""
    error: JobworkerError
    method: Method | None = None
    """The method of the request, if it is known."""
    id: CallId = None
    """The id in the reply; None also if the request has no valid id."""


Denied = Callable[[Method], JobworkerError | None]
"""Return the error for a method that the client may not call; None for one that it may call."""


def _nothing_is_denied(_: Method) -> None:
    return None


@frozen
class Encoded:
    """A result that is JSON text already, equal to that of `unstructure` and `dumps`."""

    text: str


@define(eq=False)
class ServerSession:
    """The server's side of one connection."""

    _max_in_flight: int = MAX_IN_FLIGHT
    _in_flight: set[CallId] = field(factory=set, init=False)

    @property
    def in_flight(self) -> int:
        """The number of calls whose replies are not made yet."""
        return len(self._in_flight)

    def receive(
        self, message: str | bytes, denied: Denied = _nothing_is_denied
    ) -> RpcRequest | InvalidRequest:
        """Return the call in a message, or the refusal to send back at once."""
        return self.admit(read_request(message, denied))

    def admit(self, request: RpcRequest | InvalidRequest) -> RpcRequest | InvalidRequest:
        """Admit a request from `read_request`, or refuse it if too many are in flight."""
        if isinstance(request, RpcRequest) and request.answered:
            try:
                self._admit(request.id)
            except JobworkerError as error:
                return InvalidRequest(
                    error_message(request.id, error), error, request.method, request.id
                )
        return request

    def _admit(self, id_: CallId) -> None:
        if id_ in self._in_flight:
            raise ProtocolError(f"cannot accept the request: its id {id_!r} is in flight")
        if len(self._in_flight) >= self._max_in_flight:
            raise TooManyRequests(
                f"cannot accept the request: {self._max_in_flight} are in flight on this "
                "connection",
                remedy="wait for replies, or open another connection",
            )
        self._in_flight.add(id_)

    def result(self, id_: CallId, value: object) -> str:
        """Make the reply to a call that succeeded."""
        self._in_flight.discard(id_)
        text = value.text if isinstance(value, Encoded) else dumps(unstructure(value))
        return f'{{"jsonrpc":"2.0","id":{dumps(id_)},"result":{text}}}'

    def error(self, id_: CallId, error: JobworkerError) -> str:
        """Make the reply to a call that failed."""
        self._in_flight.discard(id_)
        return error_message(id_, error)


def error_message(id_: CallId, error: JobworkerError) -> str:
    """Make the reply with an error."""
    data: dict[str, object] = {"name": error.name, **error.data}
    if error.remedy:
        data["remedy"] = error.remedy
    body = {"code": error.code, "message": error.message, "data": data}
    return dumps({"jsonrpc": "2.0", "id": id_, "error": body})


def read_request(
    message: str | bytes, denied: Denied = _nothing_is_denied
) -> RpcRequest | InvalidRequest:
    """Parse a message into a call. Pure, so a worker thread may parse a large one.

    If the client may not call the method, it gets that error and none about the parameters. In that
    case, the parameters of a large message are not even checked.
    """
    id_: CallId = None
    answered = True
    method: Method | None = None
    try:
        request = _object(message, bounded=True)
        if "id" in request:
            id_ = _checked_id(request["id"])
        name = _checked_envelope(request)
        answered = "id" in request
        method = _method_called(name)
        refused = denied(method)
        if refused is not None and takes_long(message):
            raise refused
        try:
            params: object = structure(method.params, request.get("params", {}))
        except InvalidParams as error:
            raise refused or InvalidParams(
                f"cannot call {name}: {error.message}", data=error.data
            ) from None
    except JobworkerError as error:
        # The traceback's frames would keep the message, and in a thread its result, in memory.
        error.__traceback__ = error.__context__ = None
        return InvalidRequest(error_message(id_, error) if answered else None, error, method, id_)
    return RpcRequest(id_, method, params, answered)


def encode_output(header: OutputHeader, data: bytes | bytearray) -> str:
    """Make the message for a piece of output, in base64."""
    text = base64.b64encode(data).decode("ascii")
    return f'{{"jsonrpc":"2.0",{_header_json(header)},"data":"{text}"}}}}'


def frame_output(header: OutputHeader, data: bytes | bytearray) -> Frame:
    """Make the frame with the binary message for a piece of output."""
    return frame_binary(f"{{{_header_json(header)}}}}}\n".encode("ascii"), data)


def _header_json(header: OutputHeader) -> str:
    # Formatted by hand for speed, once for every piece: nothing in it needs an escape.
    return (
        f'"method":"{OUTPUT}","params":{{"subscription":{header.subscription},'
        f'"stream":"{header.stream.value}","offset":{header.offset},'
        f'"time":"{header.time.isoformat()}"'
    )


def encode_output_end(end: OutputEnd, job: str | None = None) -> str:
    """Make the message for the end of a subscription.

    `job` is the JSON of `end.job`, if the caller has it already: a thousand subscriptions to the
    same job may end at once.
    """
    job_json = dumps(unstructure(end.job)) if job is None else job
    return (
        f'{{"jsonrpc":"2.0","method":"{OUTPUT_END}","params":{{"subscription":{end.subscription},'
        f'"offset":{end.offset},"job":{job_json},"error":{dumps(unstructure(end.error))}}}}}'
    )


@frozen
class Reply:
    """The reply to a call: its result, an instance of the method's class, or its error."""

    id: CallId
    result: object
    error: JobworkerError | None


@frozen
class Output:
    """A piece of a subscription's output."""

    header: OutputHeader
    data: bytes


@define(eq=False)
class ClientSession:
    """The client's side of one connection."""

    _next: int = 1
    _methods: dict[CallId, Method] = field(factory=dict)

    def call(self, name: str, params: object) -> tuple[int, str]:
        """Make a request: its id and its message."""
        id_, self._next = self._next, self._next + 1
        self._methods[id_] = METHODS[name]
        body = {"jsonrpc": "2.0", "id": id_, "method": name, "params": unstructure(params)}
        return id_, dumps(body)

    def forget(self, id_: CallId) -> None:
        """Forget a request that was not sent."""
        self._methods.pop(id_, None)

    def notify(self, name: str, params: object) -> str:
        """Make the message of a notification."""
        return dumps({"jsonrpc": "2.0", "method": name, "params": unstructure(params)})

    def receive(self, message: str | bytes | memoryview) -> Reply | Output | OutputEnd | None:
        """Parse a message of the server; None for notifications that this client does not know.

        The result keeps no reference to a memoryview. Raises ProtocolError if the server violates
        the protocol, and the error of a reply without id.
        """
        if not isinstance(message, str):
            return _output(message)
        body = _object(message)
        if "method" not in body:
            return self._reply(body)
        params = body.get("params")
        if body["method"] == OUTPUT and isinstance(params, dict):
            text = params.pop("data", None)
            if not isinstance(text, str):
                raise ProtocolError("cannot read a piece of output: it has no data")
            return Output(_from_server(OutputHeader, params), _decoded(text))
        if body["method"] == OUTPUT_END:
            return _from_server(OutputEnd, params)
        return None

    def _reply(self, body: Mapping[str, object]) -> Reply:
        id_ = body.get("id")
        problem = body.get("error")
        if isinstance(problem, dict):
            error = _error_from_server(problem)
            if id_ is None:
                raise error  # about the connection as a whole
        else:
            error = None
        if type(id_) is not int or id_ not in self._methods:  # True equals 1, but is not an id
            raise ProtocolError("cannot read a reply: there is no call with its id")
        method = self._methods.pop(id_)
        result = None if error is not None else _from_server(method.result, body.get("result"))
        return Reply(id_, result, error)


def _output(message: bytes | memoryview) -> Output | None:
    """Parse the piece of output in a binary message; None for another notification."""
    head, newline, _ = bytes(message[: MAX_HEADER_BYTES + 1]).partition(b"\n")
    if not newline:
        raise ProtocolError("cannot read a binary message: it has no header line")
    body = _object(head.decode("utf-8", "replace"))
    if body.get("method") != OUTPUT:
        return None
    return Output(_header_of(body.get("params")), bytes(message[len(head) + 1 :]))


def _header_of(params: object) -> OutputHeader:
    """Parse a header; by hand for speed, since each piece has one, if it has the usual form."""
    if not (
        isinstance(params, dict)
        and params.keys() == _HEADER_TYPES.keys()
        and all(type(params[name]) is kind for name, kind in _HEADER_TYPES.items())
    ):
        return _from_server(OutputHeader, params)
    with suppress(ValueError):
        time, stream = datetime.fromisoformat(params["time"]), Stream(params["stream"])
        if time.tzinfo is UTC:
            return OutputHeader(
                subscription=params["subscription"],
                stream=stream,
                offset=params["offset"],
                time=time,
            )
    return _from_server(OutputHeader, params)


def _object(message: str | bytes, *, bounded: bool = False) -> dict[str, object]:
    if isinstance(message, bytes):
        raise ProtocolError("cannot accept a binary message: requests are text")
    body = loads(message, bounded=bounded)
    if isinstance(body, list):
        raise ProtocolError("cannot accept a batch: send each request as a message of its own")
    if not isinstance(body, dict):
        raise ProtocolError("cannot accept the message: it is not a JSON-RPC object")
    return body


def _checked_id(value: object) -> CallId:
    if value is None:
        return None
    if isinstance(value, int | float) and type(value) is not bool and abs(value) < 1 << 63:
        return value
    if type(value) is str and len(value) <= MAX_ID_LENGTH and value.isprintable():
        return value
    raise ProtocolError(
        "cannot accept the request: its id must be a printable string of up to "
        f"{MAX_ID_LENGTH} characters, a number within 64 bits, or null"
    )


def _checked_envelope(request: Mapping[str, object]) -> str:
    """Check the members of a request or notification, and return the name of its method."""
    if request.get("jsonrpc") != "2.0":
        raise ProtocolError('cannot accept the request: "jsonrpc" is not "2.0"')
    name = request.get("method")
    if not isinstance(name, str):
        raise ProtocolError('cannot accept the request: "method" is not a string')
    extra = request.keys() - {"jsonrpc", "id", "method", "params"}
    if extra:
        raise ProtocolError(f"cannot accept the request: unknown member {min(extra)[:64]!r}")
    if not isinstance(request.get("params", {}), dict | list):
        raise ProtocolError('cannot accept the request: "params" is not an object')
    return name


def _method_called(name: str) -> Method:
    method = METHODS.get(name)
    if method is None:
        raise UnknownMethod(
            f"cannot call {name[:64]!r}: no such method",
            remedy="the methods are " + ", ".join(sorted(METHODS)),
        )
    return method


def _from_server(cls: type[T], value: object) -> T:
    try:
        return structure(cls, value)
    except InvalidParams as error:
        raise ProtocolError(f"cannot read the server's message: {error.message}") from None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ProtocolError(f"cannot read a piece of output: {error}") from None


def _error_from_server(problem: Mapping[str, object]) -> JobworkerError:
    code, message, data = problem.get("code"), problem.get("message"), problem.get("data", {})
    if type(code) is not int or not isinstance(message, str) or not isinstance(data, dict):
        return InternalError("cannot read the server's error")
    return error_from_wire(code, message, data)
