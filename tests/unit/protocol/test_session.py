"""The two sides of a connection: what one says is what the other hears, or a refusal."""

import json
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobworker.errors import (
    InternalError,
    InvalidParams,
    JobworkerError,
    MalformedJSON,
    NotFound,
    PermissionDenied,
    ProtocolError,
    SandboxError,
    TooManyRequests,
    UnknownMethod,
)
from jobworker.model.job import JobId
from jobworker.protocol import messages as m
from jobworker.protocol.frames import read_header
from jobworker.protocol.methods import METHODS, OUTPUT, OUTPUT_END
from jobworker.protocol.session import (
    MAX_HEADER_BYTES,
    MAX_IN_FLIGHT,
    ClientSession,
    InvalidRequest,
    Output,
    Reply,
    RpcRequest,
    ServerSession,
    encode_output,
    encode_output_end,
    frame_output,
    read_request,
)
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import loads

from ..strategies import any_text, examples, objects_with, plain_values, texts
from .messages_strategies import PARAMS, RESULTS, ends, headers

methods = st.sampled_from(sorted(METHODS))
HELLO = '{"jsonrpc":"2.0","id":%s,"method":"service.hello"}'


def call(server: ServerSession, message: str) -> RpcRequest:
    received = server.receive(message)
    assert isinstance(received, RpcRequest)
    return received


def refused_with(message: str | bytes, server: ServerSession | None = None) -> dict[str, object]:
    """The message by which a request is refused."""
    sent = refusal(message, server).message
    assert sent is not None
    body = json.loads(sent)
    assert isinstance(body, dict)
    return body


def refusal(message: str | bytes, server: ServerSession | None = None) -> InvalidRequest:
    received = (server or ServerSession()).receive(message)
    assert isinstance(received, InvalidRequest)
    return received


def wire_error(message: str) -> dict[str, object]:
    body = json.loads(message)
    assert body["jsonrpc"] == "2.0"
    assert set(body) == {"jsonrpc", "id", "error"}
    error = body["error"]
    assert isinstance(error, dict)
    return error


# --- both sides -----------------------------------------------------------------------------


@examples(max_examples=200)
@given(methods, st.data())
def test_call_and_result_arrive_as_they_were_sent(name: str, data: st.DataObject) -> None:
    client, server = ClientSession(), ServerSession()
    params, result = data.draw(PARAMS[name]), data.draw(RESULTS[name])
    id_, message = client.call(name, params)
    assert call(server, message) == RpcRequest(id_, METHODS[name], params)
    assert client.receive(server.result(id_, result)) == Reply(id_, result, None)


@examples(max_examples=100)
@given(methods, texts, texts, st.dictionaries(texts, st.integers() | texts))
def test_error_arrives_as_it_was_sent(
    name: str, message: str, remedy: str, data: dict[str, object]
) -> None:
    client, server = ClientSession(), ServerSession()
    data = {key: value for key, value in data.items() if key not in ("name", "remedy")}
    id_, _ = client.call(name, m.Nothing())
    reply = client.receive(server.error(id_, SandboxError(message, remedy=remedy, data=data)))
    assert isinstance(reply, Reply)
    assert type(reply.error) is SandboxError
    assert (reply.id, reply.result) == (id_, None)
    assert (reply.error.message, reply.error.remedy) == (message, remedy)
    assert reply.error.data == data


@examples(max_examples=50)
@given(st.lists(methods, min_size=2, max_size=6, unique=True), st.data())
def test_replies_may_come_in_any_order(wanted: list[str], data: st.DataObject) -> None:
    client, server = ClientSession(), ServerSession()
    results = {}
    for name in wanted:
        id_, message = client.call(name, data.draw(PARAMS[name]))
        call(server, message)
        results[id_] = data.draw(RESULTS[name])
    for id_ in data.draw(st.permutations(list(results))):
        assert client.receive(server.result(id_, results[id_])) == Reply(id_, results[id_], None)


@examples(max_examples=100)
@given(headers, st.binary(max_size=200), st.booleans())
def test_output_arrives_as_it_was_sent(header: m.OutputHeader, data: bytes, binary: bool) -> None:
    if not binary:
        assert ClientSession().receive(encode_output(header, data)) == Output(header, data)
        return
    frame = memoryview(b"".join(frame_output(header, data)))
    found = read_header(frame)
    assert found is not None
    assert found.whole_binary_message
    assert found.size == len(frame)
    assert ClientSession().receive(frame[found.header_bytes :]) == Output(header, data)


@examples(max_examples=60)
@given(ends)
def test_end_of_output_arrives_as_it_was_sent(end: m.OutputEnd) -> None:
    assert ClientSession().receive(encode_output_end(end)) == end


def test_notification_is_a_call_without_an_id() -> None:
    params = m.CreditParams(subscription=7, bytes=1)
    received = call(ServerSession(), ClientSession().notify("job.credit", params))
    assert received == RpcRequest(None, METHODS["job.credit"], params, answered=False)


def test_request_with_the_id_null_is_a_request() -> None:
    server = ServerSession()
    assert call(server, HELLO % "null").answered
    assert "in flight" in refusal(HELLO % "null", server).error.message
    assert json.loads(server.result(None, m.Nothing()))["id"] is None
    call(server, HELLO % "null")


@pytest.mark.parametrize(
    "message",
    [
        '{"jsonrpc":"2.0","method":"no.such"}',
        '{"jsonrpc":"2.0","method":"job.wait"}',
        '{"jsonrpc":"2.0","method":"job.credit","params":{"subscription":"x","bytes":1}}',
        '{"jsonrpc":"2.0","method":"job.wait","params":[1]}',
    ],
)
def test_notification_is_not_answered_even_where_it_is_wrong(message: str) -> None:
    assert refusal(message).message is None


def test_ids_of_calls_are_never_used_again() -> None:
    client = ClientSession()
    taken = {client.call("service.hello", m.Nothing())[0] for _ in range(100)}
    assert len(taken) == 100


# --- the server -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "error", "told"),
    [
        ("", MalformedJSON, "as JSON"),
        ("{", MalformedJSON, "as JSON"),
        ('{"id":1,"id":1}', MalformedJSON, "appears twice"),
        (HELLO % ("9" * 5000), MalformedJSON, "as JSON: a number has too many digits"),
        (HELLO % ("9" * 20_000), MalformedJSON, "as JSON: a number has too many digits"),
        ("[" * 90_000, MalformedJSON, "nested deeper than 32"),
        ("[" + "1," * 200_000 + "1]", MalformedJSON, "more than 100000 values"),
        (b"{}", ProtocolError, "requests are text"),
        ("[]", ProtocolError, "a batch"),
        (f"[{HELLO % 1}]", ProtocolError, "a batch"),
        ("null", ProtocolError, "not a JSON-RPC object"),
        ('"x"', ProtocolError, "not a JSON-RPC object"),
        ('{"id":1,"method":"service.hello"}', ProtocolError, '"jsonrpc" is not "2.0"'),
        ('{"jsonrpc":2.0,"id":1,"method":"service.hello"}', ProtocolError, "is not"),
        ('{"jsonrpc":"2.0","id":1}', ProtocolError, '"method" is not a string'),
        ('{"jsonrpc":"2.0","id":1,"method":["x"]}', ProtocolError, '"method" is not a string'),
        ('{"jsonrpc":"2.0","id":1,"method":"x","more":1}', ProtocolError, "member 'more'"),
        ('{"jsonrpc":"2.0","id":1,"method":"rm"}', UnknownMethod, "cannot call 'rm'"),
        ('{"jsonrpc":"2.0","id":1,"method":"\\ud800"}', UnknownMethod, "no such method"),
        ('{"jsonrpc":"2.0","id":1,"method":"job.wait"}', InvalidParams, "id: is missing"),
        (
            '{"jsonrpc":"2.0","id":1,"method":"job.wait","params":[1]}',
            InvalidParams,
            "must be an object, not a list",
        ),
        (
            '{"jsonrpc":"2.0","id":1,"method":"job.wait","params":null}',
            ProtocolError,
            '"params" is not an object',
        ),
        ('{"jsonrpc":"2.0","id":1,"method":"job.wait","params":"x"}', ProtocolError, "an object"),
        ('{"jsonrpc":"2.0","method":1,"params":"bar"}', ProtocolError, '"method" is not a string'),
        ('{"jsonrpc":"2.0","method":"job.wait","params":"bar"}', ProtocolError, "an object"),
        ('{"jsonrpc":"2.0","method":"job.wait","x":1}', ProtocolError, "member 'x'"),
    ],
)
def test_unsound_request_is_refused(
    message: str | bytes, error: type[JobworkerError], told: str
) -> None:
    refused = refusal(message)
    assert type(refused.error) is error
    assert told in refused.error.message
    assert refused.message is not None
    sent = wire_error(refused.message)
    assert (sent["code"], sent["message"]) == (error.code, refused.error.message)


@pytest.mark.parametrize(
    "id_",
    [
        "true",
        "1e300",
        "[]",
        "{}",
        '"' + "x" * 129 + '"',
        str(1 << 63),
        '"a\\nb"',
        '"\\ud800"',
        str(-(1 << 63)),
    ],
)
def test_id_that_is_no_short_text_number_or_null_is_refused(id_: str) -> None:
    refused = refusal(HELLO % id_)
    assert type(refused.error) is ProtocolError
    assert refused_with(HELLO % id_)["id"] is None


@pytest.mark.parametrize("id_", [0, -1, (1 << 63) - 1, "", "x" * 128, "é", 1.5, -0.1, None])
def test_id_comes_back_with_the_reply(id_: str | float | None) -> None:
    server = ServerSession()
    assert call(server, HELLO % json.dumps(id_)).id == id_
    reply = json.loads(server.result(id_, m.Nothing()))
    assert reply == {"jsonrpc": "2.0", "id": id_, "result": {}}
    refused = refused_with('{"jsonrpc":"2.0","method":"x","id":' + json.dumps(id_) + "}", server)
    assert refused["id"] == id_


def test_id_in_flight_is_refused_until_its_reply() -> None:
    server = ServerSession()
    for fails in (False, True):
        call(server, HELLO % 1)
        assert "in flight" in refusal(HELLO % 1, server).error.message
        call(server, HELLO % '"1"')  # a text is another id
        server.result("1", m.Nothing())
        if fails:
            server.error(1, NotFound("cannot find it"))
        else:
            server.result(1, m.Nothing())
    call(server, HELLO % 1)


def test_refused_request_takes_no_place() -> None:
    server = ServerSession()
    for _ in range(3):
        refusal('{"jsonrpc":"2.0","id":1,"method":"job.wait"}', server)
    call(server, HELLO % 1)


def test_requests_in_flight_are_bounded_and_notifications_are_not_among_them() -> None:
    server = ServerSession()
    notification = ClientSession().notify("job.unfollow", m.SubscriptionParams(subscription=1))
    for number in range(MAX_IN_FLIGHT):
        call(server, HELLO % number)
        call(server, notification)
    assert type(refusal(HELLO % MAX_IN_FLIGHT, server).error) is TooManyRequests
    call(server, notification)
    server.result(0, m.Nothing())
    call(server, HELLO % MAX_IN_FLIGHT)


def test_unknown_method_of_any_length_is_told_in_a_few_words() -> None:
    refused = refused_with(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "x" * 100_000}))
    assert len(json.dumps(refused)) < 1000


near_requests: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | plain_values,
        "id": st.integers() | any_text | plain_values,
        "method": methods | any_text | plain_values,
        "params": objects_with(["id", "job", "follow", "limit", "signal", "grace_seconds"])
        | st.fixed_dictionaries(
            {"job": objects_with(["command", "environment", "limits", "workdir", "name"])}
        )
        | plain_values,
    },
)


@examples(max_examples=400)
@given(any_text | near_requests.map(json.dumps) | plain_values.map(json.dumps) | st.binary())
@example(
    '{"jsonrpc":"2.0","id":1,"method":"job.stop","params":{"id":"x","grace_seconds":1%s}}'
    % ("0" * 400)
)
def test_whatever_comes_in_is_a_call_or_a_refusal_that_can_be_sent(message: str | bytes) -> None:
    server = ServerSession()
    received = server.receive(message)
    if isinstance(received, RpcRequest):
        assert isinstance(received.params, received.method.params)
        assert type(received.id) in (int, float, str, type(None))
        return
    if received.message is None:
        return
    sent = wire_error(received.message.encode().decode())
    assert sent["code"] == received.error.code
    server.receive(HELLO % 1)  # and the session goes on


# --- the client -----------------------------------------------------------------------------


def in_flight() -> ClientSession:
    client = ClientSession()
    client.call("service.hello", m.Nothing())
    return client


GOOD_HEADER = {"subscription": 1, "stream": "stdout", "offset": 0, "time": "2026-01-31T12:00:00Z"}


@pytest.mark.parametrize(
    "body",
    [
        {"id": 2, "result": {}},
        {"id": "1", "result": {}},
        {"id": True, "result": {"version": "", "name": "", "role": ""}},
        {"id": 1.0, "result": {"version": "", "name": "", "role": ""}},
        {"id": None, "result": {}},
        {"id": [1], "result": {}},
        {"result": {}},
        {},
        {"id": 1},
        {"id": 1, "result": None},
        {"id": 1, "result": {"version": "1"}},
        {"id": 1, "result": {"version": 1, "name": "", "role": ""}},
        {"id": 1, "error": "text"},
        {"method": OUTPUT, "params": GOOD_HEADER},
        {"method": OUTPUT, "params": {**GOOD_HEADER, "data": 5}},
        {"method": OUTPUT, "params": {**GOOD_HEADER, "data": "YQ"}},
        {"method": OUTPUT, "params": {**GOOD_HEADER, "data": "YQ=="[:3]}},
        {"method": OUTPUT, "params": {**GOOD_HEADER, "data": "!!!!"}},
        {"method": OUTPUT, "params": {**GOOD_HEADER, "data": "é"}},
        {"method": OUTPUT, "params": {**GOOD_HEADER, "data": "", "x": 1}},
        {"method": OUTPUT, "params": {"data": ""}},
        {"method": OUTPUT_END, "params": {}},
        {"method": OUTPUT_END},
        [],
        None,
        "text",
    ],
)
def test_server_that_breaks_the_protocol_is_told_apart(body: object) -> None:
    with pytest.raises(ProtocolError):
        in_flight().receive(json.dumps(body))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"no newline",
        b"\n",
        b"\xff\n",
        b"[]\n",
        json.dumps({"method": OUTPUT}).encode() + b"\n",
        json.dumps({"method": OUTPUT, "params": {**GOOD_HEADER, "offset": -0.5}}).encode() + b"\nx",
        json.dumps({"method": OUTPUT, "params": GOOD_HEADER}).encode(),
        b" " * MAX_HEADER_BYTES
        + json.dumps({"method": OUTPUT, "params": GOOD_HEADER}).encode()
        + b"\nx",
    ],
    ids=lambda message: repr(message[:20]),
)
def test_binary_message_without_a_sound_header_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        ClientSession().receive(message)


def test_reply_answers_once() -> None:
    client, server = in_flight(), ServerSession()
    reply = server.result(1, m.Welcome(version="1", name="a", role="admin"))
    assert client.receive(reply) is not None
    with pytest.raises(ProtocolError, match="no call with its id"):
        client.receive(reply)


def test_error_about_the_connection_is_raised_as_what_it_is() -> None:
    message = json.dumps(refused_with("{"))
    with pytest.raises(MalformedJSON):
        ClientSession().receive(message)


@pytest.mark.parametrize(
    "error",
    [
        {"code": "x", "message": "m"},
        {"code": 1003},
        {"code": True, "message": "m"},
        {},
        {"code": 1003, "message": "m", "data": []},
    ],
)
def test_error_that_cannot_be_read_is_an_error_all_the_same(error: object) -> None:
    reply = in_flight().receive(json.dumps({"id": 1, "error": error}))
    assert isinstance(reply, Reply)
    assert type(reply.error) is InternalError


@pytest.mark.parametrize(
    "encode", [json.dumps, lambda body: json.dumps(body).encode() + b"\nbytes"]
)
def test_notification_that_the_client_does_not_know_is_passed_over(
    encode: Callable[[object], str | bytes],
) -> None:
    assert ClientSession().receive(encode({"method": "job.event", "params": {"x": 1}})) is None


near_replies: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just(1) | plain_values,
        "method": st.sampled_from([OUTPUT, OUTPUT_END]) | plain_values,
        "result": objects_with(["version", "name", "role"]) | plain_values,
        "error": objects_with(["code", "message", "data"]) | plain_values,
        "params": objects_with([*GOOD_HEADER, "data", "job", "error"]) | plain_values,
    },
)


@examples(max_examples=400)
@given(
    any_text
    | near_replies.map(json.dumps)
    | plain_values.map(json.dumps)
    | st.binary()
    | near_replies.map(lambda body: json.dumps(body).encode() + b"\nbytes")
)
def test_whatever_the_server_says_is_read_or_refused(message: str | bytes) -> None:
    try:
        received = in_flight().receive(message)
    except JobworkerError:
        return
    assert received is None or isinstance(received, Reply | Output | m.OutputEnd)


def test_messages_are_json_rpc_to_the_letter() -> None:
    id_, message = ClientSession().call("job.status", m.JobParams(id=JobId(5)))
    body = {"jsonrpc": "2.0", "id": id_, "method": "job.status", "params": {"id": 5}}
    assert loads(message) == body
    sent = wire_error(ServerSession().error(3, NotFound("cannot", remedy="look", data={"x": 1})))
    assert sent == {
        "code": 1003,
        "message": "cannot",
        "data": {"name": "not_found", "x": 1, "remedy": "look"},
    }
    assert unstructure(m.Nothing()) == {}


@pytest.mark.parametrize("command", [["x" * 20_000], [{}] * 501], ids=["characters", "containers"])
def test_who_may_not_call_has_no_long_parameters_looked_at(
    monkeypatch: pytest.MonkeyPatch, command: list[object]
) -> None:
    def structure(*_: object) -> object:
        pytest.fail("they were looked at")

    monkeypatch.setattr("jobworker.protocol.session.structure", structure)
    body = {"jsonrpc": "2.0", "id": 1, "method": "job.run", "params": {"job": {"command": command}}}
    refused = read_request(json.dumps(body), lambda _: PermissionDenied("no"))
    assert isinstance(refused, InvalidRequest)
    assert isinstance(refused.error, PermissionDenied)
