"""The states of a job as one table.

    PENDING ──admit──► INITIALIZING ──start──► RUNNING ──succeed──► COMPLETED
       │                    │                     ├─────fail──────► FAILED (with a reason)
       └──stop──► STOPPED   ├──fail──► FAILED     └─────stop──────► STOPPED
                            └──stop──► STOPPED

`advance` is pure: it returns the next state or raises ValueError. No other code decides about
states. A job that ends while it is being stopped becomes STOPPED, whatever its exit status is,
because the caller asked for the stop.
"""

from enum import Enum


class State(Enum):
    """The state of a job."""

    PENDING = "PENDING"
    INITIALIZING = "INITIALIZING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


class Event(Enum):
    """An event that changes the state of a job."""

    ADMIT = "admit"
    START = "start"
    SUCCEED = "succeed"
    FAIL = "fail"
    STOP = "stop"


class Reason(Enum):
    """The reason why a job is FAILED."""

    EXIT = "exit"  #: it ended with a code other than 0
    SIGNAL = "signal"  #: a signal ended it that the service did not send
    OOM = "oom"  #: it was killed for memory: at its own limit, or as `detail` explains
    TIMEOUT = "timeout"  #: it ran longer than allowed
    OUTPUT = "output"  #: its output could not be kept, and its policy is to stop it then
    DISK = "disk"  #: it ended with 0, but some data that it wrote to its disk or volumes is lost
    START = "start"  #: a step of its start failed
    LOST = "lost"  #: the service or its launcher died while it ran


WAITING = frozenset({State.PENDING})
LIVE = frozenset({State.PENDING, State.INITIALIZING, State.RUNNING})
TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.STOPPED})

_TABLE: dict[tuple[State, Event], State] = {
    (State.PENDING, Event.ADMIT): State.INITIALIZING,
    (State.PENDING, Event.STOP): State.STOPPED,
    (State.PENDING, Event.FAIL): State.FAILED,
    (State.INITIALIZING, Event.START): State.RUNNING,
    (State.INITIALIZING, Event.FAIL): State.FAILED,
    (State.INITIALIZING, Event.STOP): State.STOPPED,
    (State.RUNNING, Event.SUCCEED): State.COMPLETED,
    (State.RUNNING, Event.FAIL): State.FAILED,
    (State.RUNNING, Event.STOP): State.STOPPED,
}


def advance(state: State, event: Event) -> State:
    """Return the state after `event`. Raises ValueError if the table has no such pair."""
    try:
        return _TABLE[state, event]
    except KeyError:
        raise ValueError(f"a job that is {state.value} cannot {event.value}") from None
