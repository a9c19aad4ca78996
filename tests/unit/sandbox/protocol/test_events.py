"""Events of the launcher arrive as they were told, or are refused by name."""

import pytest

from jobworker.sandbox.cgroup.accounting import ScopeUsage
from jobworker.sandbox.protocol import events
from jobworker.sandbox.protocol import fields as f
from jobworker.sandbox.protocol.replies import HowEnded

ENDED = events.JobEnded(
    job=7,
    seconds_ago=0.25,
    how=HowEnded(code=None, signal=9, lost=("", "data"), unseen=("more",), want="kernel"),
    usage=ScopeUsage(memory_bytes=1 << 20, oom_kills=1),
    measured=True,
)
NETWORK_ENDED = events.NetworkEnded(job=7, why="it was killed")


@pytest.mark.parametrize("event", [ENDED, NETWORK_ENDED])
def test_event_arrives_as_it_was_told(event: events.Event) -> None:
    assert events.read(events.message_of(event)) == event


@pytest.mark.parametrize(
    "message", [{"id": 7, "ok": {}}, {"event": "of a later launcher"}, {"event": 7}, {"event": []}]
)
def test_message_that_is_no_known_event_is_passed_over(message: f.Object) -> None:
    assert events.read(message) is None


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"job": "7"}, "job"),
        ({"usage": []}, "usage"),
        ({"code": "0"}, "code"),
        ({"lost": 1}, "lost"),
    ],
)
def test_event_that_is_not_allowed_is_refused_by_its_name(wrong: f.Object, named: str) -> None:
    message = {**events.message_of(ENDED), **wrong}
    with pytest.raises(f.Malformed, match=f"the event exit: {named} is no"):
        events.read(message)


def test_earlier_launcher_leaves_out_what_it_does_not_know() -> None:
    message = events.message_of(ENDED)
    for name in ("lost", "unseen", "want", "measured", "ended_seconds_ago"):
        del message[name]
    told = events.read(message)
    assert isinstance(told, events.JobEnded)
    assert told == ENDED._replace(seconds_ago=0.0, how=HowEnded(None, 9, (), (), None))
