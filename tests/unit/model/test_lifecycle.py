"""The states of a job: every pair of state and event does what is written here."""

import itertools

import pytest

from jobworker.model.lifecycle import LIVE, TERMINAL, WAITING, Event, State, advance

# Written out once more, and by state, so that a slip in the table shows.
NEXT = {
    State.PENDING: {
        Event.ADMIT: State.INITIALIZING,
        Event.STOP: State.STOPPED,
        Event.FAIL: State.FAILED,
    },
    State.INITIALIZING: {
        Event.START: State.RUNNING,
        Event.STOP: State.STOPPED,
        Event.FAIL: State.FAILED,
    },
    State.RUNNING: {
        Event.SUCCEED: State.COMPLETED,
        Event.STOP: State.STOPPED,
        Event.FAIL: State.FAILED,
    },
    State.COMPLETED: {},
    State.FAILED: {},
    State.STOPPED: {},
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_leads_where_it_should_or_is_refused(state: State, event: Event) -> None:
    expected = NEXT[state].get(event)
    if expected is not None:
        assert advance(state, event) is expected
        return
    with pytest.raises(ValueError, match=f"a job that is {state.value} cannot {event.value}"):
        advance(state, event)


def test_sets_of_states_agree_with_the_table() -> None:
    assert {state for state in State if not NEXT[state]} == TERMINAL
    assert set(State) - TERMINAL == LIVE
    assert WAITING < LIVE


def test_every_state_can_be_reached_and_every_live_one_left() -> None:
    reached, waiting = {State.PENDING}, [State.PENDING]
    while waiting:
        for following in NEXT[waiting.pop()].values():
            if following not in reached:
                reached.add(following)
                waiting.append(following)
    assert reached == set(State)
    for state in LIVE:
        assert advance(state, Event.STOP) in TERMINAL
        assert advance(state, Event.FAIL) in TERMINAL
