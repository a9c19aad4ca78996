"""What the launcher makes of a child's messages, and of the end of its socket."""

import os
import resource
import socket
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox import channel
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.child_messages import ChildMessages
from jobworker.sandbox.launcher.orders import Orders
from jobworker.sandbox.launcher.reports import DIED
from jobworker.sandbox.launcher.spares import Spares
from jobworker.sandbox.protocol.fields import decode
from jobworker.sandbox.protocol.replies import REFUSAL, Refusal
from jobworker.sandbox.service.launcher_refusals import explain

from ....descriptors import descriptors
from .conftest import QuietPool, new_child, pass_turns_until


class Heard:
    """A child with its socket, and what its messages have led to."""

    def __init__(self, pool: QuietPool) -> None:
        self.child, self.spares = new_child(0), Spares(1)
        self.killed, self.started, self.ordered = list[Child](), list[Child](), list[Child]()
        orders = cast("Orders", SimpleNamespace(give_ahead=self.ordered.append))
        self.messages = ChildMessages(
            pool.event_loop,
            pool.sweepers,
            self.spares,
            orders,
            self.killed.append,
            self.started.append,
        )
        self.child.sock, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.child.sock.setblocking(False)

    def read(self) -> None:
        self.messages.read(self.child)


@pytest.fixture
def heard(pool: QuietPool) -> Iterator[Heard]:
    made = Heard(pool)
    yield made
    made.far.close()
    if made.child.sock is not None:
        made.child.sock.close()


def test_spare_that_is_ready_gets_the_usual_order_ahead(heard: Heard) -> None:
    heard.spares.add(heard.child)
    channel.send(heard.far, {"ready": True})
    heard.read()
    assert heard.child.ready
    assert heard.ordered == [heard.child]


def test_child_of_a_start_gets_no_order_ahead(heard: Heard) -> None:
    channel.send(heard.far, {"ready": True})
    heard.read()
    assert heard.child.ready
    assert not heard.ordered


def test_child_that_executes_its_program_has_started(heard: Heard) -> None:
    heard.child.ready, heard.child.job, heard.child.request = True, 1, 7
    heard.far.close()
    heard.read()
    assert heard.started == [heard.child]
    assert heard.child.sock is None
    assert not heard.killed


def test_spare_that_ends_waits_no_more(heard: Heard) -> None:
    heard.spares.add(heard.child)
    heard.far.close()
    heard.read()
    assert heard.child not in heard.spares
    assert heard.child.failure == DIED
    assert not heard.started


def test_child_that_ends_before_it_has_its_order_is_told_as_no_start(heard: Heard) -> None:
    child = heard.child
    child.ready, child.order = True, os.memfd_create("order", os.MFD_CLOEXEC)
    child.job, child.request = 1, 7
    heard.far.close()
    heard.read()
    assert (child.request, child.failure) == (7, DIED)
    assert not heard.started
    os.close(child.order)


def test_lost_descriptors_of_a_child_are_told_and_none_is_left_open(
    heard: Heard, pool: QuietPool
) -> None:
    child = heard.child
    assert child.sock is not None
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    channel.send(heard.far, {"disk": True}, [null, null])
    pool.event_loop.watch(child.sock.fileno(), partial(heard.messages.read, child))
    before = len(descriptors())
    first_free = os.dup(null)
    os.close(first_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 1, limits[1]))
    try:
        pool.event_loop.run_once()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert child.failure is not None
    assert "LimitNOFILE=" in explain(decode(Refusal, REFUSAL, child.failure)).remedy
    assert heard.killed == [child]
    sweepers, forks = pool.sweepers, pool.forks
    pass_turns_until(pool.event_loop, lambda: sweepers.is_idle and forks.is_idle)
    assert len(descriptors()) == before - 1, "its socket has gone, nothing has come"
    os.close(null)
