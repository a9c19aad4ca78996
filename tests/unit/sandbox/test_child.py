"""The order that a child gets: as it was given, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import ProtocolError
from jobworker.sandbox.channel import Message, decode, encode
from jobworker.sandbox.child import order_from, order_message
from jobworker.sandbox.plan import Order

from ..strategies import examples, texts, variables

orders = st.builds(
    Order,
    hostname=texts,
    arguments=st.lists(texts, max_size=5).map(tuple),
    environment=variables,
    workdir=texts,
)


def sent(message: Message) -> Message:
    """The message as its receiver has it."""
    packet, ancillary, _ = encode(message, ())
    return decode(packet, ancillary, 0)[0]


@examples(max_examples=100)
@given(orders)
def test_order_arrives_as_it_was_sent(order: Order) -> None:
    assert order_from(sent(order_message(order))) == order


@pytest.mark.parametrize(
    ("key", "value"),
    [("hostname", 1), ("workdir", None), ("arguments", "sh"), ("environment", [["A", "b"]])],
)
def test_order_of_other_types_is_refused(key: str, value: object) -> None:
    message = order_message(Order("job-1", ("sh",), {}, ""))
    with pytest.raises(ProtocolError, match="wrong types"):
        order_from({**message, key: value})
