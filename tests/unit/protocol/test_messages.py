"""The wire's classes: every parameter is held to its bounds, and comes back as it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import InvalidParams
from jobworker.model.job import Stream
from jobworker.protocol import messages as m
from jobworker.protocol.methods import METHODS
from jobworker.serialization.convert import structure, unstructure
from jobworker.serialization.json_text import dumps, loads

from ..strategies import examples
from .messages_strategies import PARAMS, RESULTS


@examples(max_examples=200)
@given(st.data())
def test_every_message_comes_back_as_it_was(data: st.DataObject) -> None:
    row = METHODS[data.draw(st.sampled_from(sorted(METHODS)))]
    for cls, made in ((row.params, PARAMS[row.name]), (row.result, RESULTS[row.name])):
        value = data.draw(made)
        assert structure(cls, loads(dumps(unstructure(value)))) == value


@pytest.mark.parametrize(
    ("cls", "value", "told"),
    [
        (m.JobParams, {"id": 0}, "id: must be from 1"),
        (m.JobParams, {"id": -1}, "id: must be from 1"),
        (m.JobParams, {"id": 1 << 63}, "id: must be from 1"),
        (m.JobParams, {"id": True}, "id: must be an integer"),
        (m.JobParams, {"id": "1"}, "id: must be an integer"),
        (m.JobParams, {}, "id: is missing"),
        (m.StopParams, {"id": 1, "grace_seconds": -0.1}, "grace_seconds: must be from 0"),
        (m.StopParams, {"id": 1, "grace_seconds": 10**400}, "grace_seconds: must be a finite"),
        (m.StopParams, {"id": 1, "signal": 15}, "signal: must be a string"),
        (m.ListParams, {"limit": 0}, "limit: must be from 1 to 1000"),
        (m.ListParams, {"limit": 1001}, "limit: must be from 1 to 1000"),
        (m.ListParams, {"states": ["running"]}, "states[0]: must be one of PENDING"),
        (m.ListParams, {"states": "RUNNING"}, "states: must be a list"),
        (m.ListParams, {"before": 0}, "before: must be from 1"),
        (m.LogParams, {"id": 1, "offset": -1}, "offset: must be from 0"),
        (m.LogParams, {"id": 1, "streams": ["stdin"]}, "streams[0]: must be one of stdout"),
        (m.LogParams, {"id": 1, "delivery": {"encoding": "gzip"}}, "delivery.encoding: must be"),
        (m.LogParams, {"id": 1, "delivery": {"credit_bytes": -1}}, "delivery.credit_bytes: must"),
        (m.CreditParams, {"subscription": 1, "bytes": 0}, "bytes: must be from 1"),
        (m.CreditParams, {"subscription": 1, "bytes": (1 << 30) + 1}, "bytes: must be from 1"),
        (m.RunParams, {"job": {"command": []}}, "job.command: is empty"),
        (m.RunParams, {"job": {"command": ["a"], "network": "bridge"}}, "job.network: must be"),
        (m.Nothing, {"x": 1}, "unknown key 'x'"),
        (m.Nothing, None, "must be an object, not null"),
    ],
)
def test_parameter_out_of_bounds_is_refused(cls: type, value: object, told: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        structure(cls, value)
    assert told in caught.value.message


def test_log_without_more_is_both_streams_from_the_start_and_followed() -> None:
    made = structure(m.LogParams, {"id": 1})
    assert (made.follow, made.offset, made.streams) == (True, 0, tuple(Stream))
    assert made.delivery == m.Delivery(encoding=m.Encoding.BASE64, credit_bytes=None)
