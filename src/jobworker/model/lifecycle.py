"""The states of a job as one table.

    PENDING ──admit──► INITIALIZING ──start──► RUNNING ──succeed──► COMPLETED
       │                    │                     ├─────fail──────► FAILED (with a reason)
       └──stop──► STOPPED   ├──fail──► FAILED     └─────stop──────► STOPPED
                            └──stop──► STOPPED

`advance` is pure: it answers the next state or raises ValueError; nothing else decides. A job
that was being stopped ends as STOPPED whatever its exit status was: the caller asked for it.
"""

from enum import Enum


class State(Enum):
    """Where a job stands."""

    PENDING = "PENDING"
    INITIALIZING = "INITIALIZING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


class Event(Enum):
    """What may befall a job."""

    ADMIT = "admit"
    START = "start"
    SUCCEED = "succeed"
    FAIL = "fail"
    STOP = "stop"


class Reason(Enum):
    """Why a job is FAILED."""

    EXIT = "exit"  #: it ended with a code other than 0
    SIGNAL = "signal"  #: a signal ended it that we did not send
    OOM = "oom"  #: killed for want of memory: its own limit, or what `detail` says
    TIMEOUT = "timeout"  #: it ran longer than allowed
    OUTPUT = "output"  #: its output could not be kept, and the policy is to stop it then
    DISK = "disk"  #: it ended with 0, and some of what it wrote to its disk or volumes is lost
    START = "start"  #: a step of its start failed
    LOST = "lost"  #: the service or its launcher died under it


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
    """The state after `event`; raises ValueError where the table has no such pair."""
    try:
        return _TABLE[state, event]
    except KeyError:
        raise ValueError(f"a job that is {state.value} cannot {event.value}") from None
