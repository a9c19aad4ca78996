"""Both sides of a connection wired together, while messages are reordered, repeated and dropped."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from jobworker.errors import NotFound, ProtocolError, TooManyRequests
from jobworker.model.job import Stream
from jobworker.protocol import messages as m
from jobworker.protocol.session import (
    ClientSession,
    InvalidRequest,
    Output,
    Reply,
    RpcRequest,
    ServerSession,
    encode_output,
)

MAX = 3
TIME = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Conversation(RuleBasedStateMachine):
    """The model: which calls wait where, and what has been answered."""

    requests = Bundle("requests")
    replies = Bundle("replies")

    def __init__(self) -> None:
        super().__init__()
        self.client, self.server = ClientSession(), ServerSession(MAX)
        self.waiting: set[object] = set()
        """Calls that the client has not heard about."""
        self.in_flight: dict[object, RpcRequest] = {}
        """Calls that the server has not answered."""

    @rule(target=requests)
    def call(self) -> tuple[int, str]:
        id_, message = self.client.call("service.hello", m.Nothing())
        assert id_ not in self.waiting
        self.waiting.add(id_)
        return id_, message

    @rule(request=consumes(requests), twice=st.booleans(), target=requests)
    def repeat_or_drop(self, request: tuple[int, str], twice: bool) -> object:
        return multiple(request, request) if twice else multiple()

    @rule(request=consumes(requests), target=replies)
    def arrive(self, request: tuple[int, str]) -> object:
        id_, message = request
        received = self.server.receive(message)
        if isinstance(received, RpcRequest):
            assert id_ not in self.in_flight
            assert len(self.in_flight) < MAX
            self.in_flight[id_] = received
            return multiple()
        assert isinstance(received, InvalidRequest)
        busy = isinstance(received.error, TooManyRequests)
        assert busy is (id_ not in self.in_flight)
        assert received.message is not None
        assert json.loads(received.message)["id"] == id_
        return received.message

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), fails=st.booleans(), target=replies)
    def answer(self, data: st.DataObject, fails: bool) -> str:
        id_ = data.draw(st.sampled_from(sorted(self.in_flight, key=str)))
        call = self.in_flight.pop(id_)
        if fails:
            return self.server.error(call.id, NotFound(f"cannot find {id_}"))
        return self.server.result(call.id, m.Welcome(version="1", name=str(id_), role="admin"))

    @rule(reply=consumes(replies), twice=st.booleans(), target=replies)
    def repeat_or_drop_reply(self, reply: str, twice: bool) -> object:
        return multiple(reply, reply) if twice else multiple()

    @rule(reply=consumes(replies))
    def hear(self, reply: str) -> None:
        id_ = json.loads(reply)["id"]
        if id_ not in self.waiting:
            with pytest.raises(ProtocolError, match="no call with its id"):
                self.client.receive(reply)
            return
        received = self.client.receive(reply)
        assert isinstance(received, Reply)
        assert received.id == id_
        self.waiting.remove(id_)
        if received.error is None:
            assert isinstance(received.result, m.Welcome)
            assert received.result.name == str(id_)
        elif isinstance(received.error, NotFound):
            assert received.error.message.endswith(f" {id_}")

    @rule(data=st.binary(max_size=20), stream=st.sampled_from(Stream))
    def hear_output(self, data: bytes, stream: Stream) -> None:
        header = m.OutputHeader(subscription=1, stream=stream, offset=5, time=TIME)
        received = self.client.receive(encode_output(header, data))
        assert isinstance(received, Output)
        assert (received.header, bytes(received.data)) == (header, data)

    @rule(text=st.text(max_size=20) | st.binary(max_size=20))
    def hear_nonsense(self, text: str | bytes) -> None:
        with pytest.raises(ProtocolError):
            self.client.receive(text)

    @invariant()
    def server_counts_what_it_has_not_answered(self) -> None:
        assert self.server._in_flight == set(self.in_flight)


Conversation.TestCase.settings = settings(stateful_step_count=40)
TestConversation = Conversation.TestCase
