"""How a child gets its order: its limits, its host name, and what is left if that fails."""

import errno
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.cgroup.hierarchy import JobScope, ScopeLimits
from jobworker.sandbox.launcher.child import Child, PendingStart
from jobworker.sandbox.launcher.orders import Orders
from jobworker.sandbox.protocol.requests import Spawn
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.plan import Order

from .conftest import QuietPool, new_child

IMAGE = b"what to execute"
LIMITS = ScopeLimits(memory_bytes=64 << 20)
START = PendingStart(
    7,
    Spawn(1, Order("job-1", ("true",), {}, "/"), LIMITS),
    trampoline.ExecImage(IMAGE, "/", "true", ("/bin/true",)),
    60,
)


class Given:
    """A child that waits for its order, the limits that it got, and who was killed."""

    def __init__(self, pool: QuietPool) -> None:
        self.names, self.event_loop = pool.host_names, pool.event_loop
        self.killed = list[Child]()
        self.orders = Orders(pool.given, self.killed.append)
        self.child = new_child(0)
        self.limits = list[ScopeLimits]()
        scope = SimpleNamespace(arm=self.limits.append, arm_ahead=self.limits.append)
        self.child.scope = cast("JobScope", scope)
        self.child.sock, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.far.setblocking(False)
        self.child.order = os.memfd_create("order", os.MFD_CLOEXEC)
        self.image = os.dup(self.child.order)

    @property
    def order(self) -> bytes:
        """The order that the child was told to read; empty before."""
        try:
            return os.pread(self.image, 100, 0) if self.far.recv(10) == trampoline.GO else b""
        except BlockingIOError:
            return b""


@pytest.fixture
def given(pool: QuietPool) -> Iterator[Given]:
    made = Given(pool)
    yield made
    made.far.close()
    assert made.child.sock is not None
    made.child.sock.close()
    os.close(made.image)
    if made.child.order >= 0:
        os.close(made.child.order)


def test_child_that_has_its_host_name_gets_its_order_at_once(given: Given) -> None:
    given.child.host_name = "job-1"
    given.orders.give(given.child, START)
    assert given.limits == [LIMITS]
    assert given.order == IMAGE
    assert not given.names.asked


def test_child_gets_its_order_when_it_has_its_host_name(given: Given) -> None:
    given.orders.give(given.child, START)
    assert given.limits == [LIMITS]
    assert given.order == b""
    ((pidfd, name, done),) = given.names.asked
    assert (pidfd, name) == (given.child.pidfd, "job-1")
    assert given.names.next == "job-2"
    done({})
    assert given.order == IMAGE
    assert not given.killed


def test_child_whose_host_name_cannot_be_set_is_killed_and_has_the_reason(given: Given) -> None:
    given.orders.give(given.child, START)
    given.names.asked[0][2]({"errno": errno.ENOMEM})
    assert given.killed == [given.child]
    assert given.child.failure is not None
    assert "cannot set the host name" in str(given.child.failure["detail"])
    assert given.order == b""


def test_name_of_a_child_that_may_not_be_touched_yet_is_set_again(given: Given) -> None:
    """It has changed its ids, and has not executed the trampoline."""
    given.orders.give(given.child, START)
    for tries in range(1, 4):
        given.names.asked[-1][2]({"errno": errno.EPERM})
        assert not given.killed
        while len(given.names.asked) == tries:
            given.event_loop.run_once()
    given.names.asked[-1][2]({})
    assert given.order == IMAGE


@pytest.mark.parametrize("ends", [False, True])
def test_name_is_not_set_again_for_ever(given: Given, ends: bool) -> None:
    given.orders.give(given.child, START)
    given.names.asked[-1][2]({"errno": errno.EPERM})
    given.child.doomed, given.child.ready = ends, True
    while given.event_loop._alarms:
        given.event_loop.run_once()
    if ends:
        assert len(given.names.asked) == 1
        assert given.child.failure is None
    else:
        given.names.asked[-1][2]({"errno": errno.EPERM})
        assert given.killed == [given.child]
        assert "cannot set the host name" in str(given.child.failure)


def test_child_that_ends_while_its_name_is_set_says_itself_why(given: Given) -> None:
    given.orders.give(given.child, START)
    given.names.asked[0][2]({"errno": errno.ESRCH})
    assert given.killed == [given.child]
    assert given.child.failure is None


def test_child_that_was_killed_while_its_name_was_set_gets_no_order(given: Given) -> None:
    given.orders.give(given.child, START)
    given.child.doomed = True
    given.names.asked[0][2]({})
    assert given.order == b""


def test_child_whose_limits_cannot_be_set_is_killed(given: Given) -> None:
    def refuse(_: ScopeLimits) -> None:
        raise OSError(errno.EINVAL, "on purpose")

    given.child.scope.arm = refuse  # type: ignore[assignment, method-assign]
    with pytest.raises(OSError, match="on purpose"):
        given.orders.give(given.child, START)
    assert given.killed == [given.child]
    assert given.order == b""


def test_spare_gets_the_limits_of_the_latest_job_and_a_name_ahead(given: Given) -> None:
    given.orders.give_ahead(given.child)
    given.orders.give(given.child, START)
    given.orders.give_ahead(given.child)
    assert given.limits == [ScopeLimits(), LIMITS, LIMITS]
    assert given.names.ahead == [given.child, given.child]
