"""When the wall of a job's private network is built anew, and which ends of networks are told."""

import errno
import os
import signal
import socket
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import pytest

from jobworker.sandbox.channel import Message
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.launcher import walls as walls_module
from jobworker.sandbox.launcher.child import Child, ChildExit
from jobworker.sandbox.launcher.walls import Walls
from jobworker.sandbox.network.modes import Networks
from jobworker.sandbox.network.slirp import Layout, choose_layout
from jobworker.sandbox.start import wall

from .conftest import StartChild


class Played:
    """The host's addresses, as the test plays them."""

    def __init__(self, changes: socket.socket) -> None:
        self.changes, self.program, self.fails = changes, b"first", False

    def refresh(self) -> bool:
        if self.fails:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return bool(self.changes.recv(1))

    def wall_for(self, _: Layout) -> bytes:
        return self.program


class Built:
    """Walls of some children, the walls that they have built, and what they have told."""

    def __init__(
        self, event_loop: EventLoop, near: socket.socket, children: Collection[Child]
    ) -> None:
        self.event_loop, self.host = event_loop, Played(near)
        self.told: list[Message] = []
        self.built: list[tuple[int, bytes]] = []
        networks = cast("Networks", self.host)
        self.walls = Walls(event_loop, networks, children, self._tell)

    def _tell(self, message: Message, descriptors: Sequence[int]) -> None:
        assert not descriptors
        self.told.append(message)

    def record(self, gateway: int, program: bytes) -> None:
        self.built.append((gateway, program))


@pytest.fixture
def children() -> list[Child]:
    return []


@pytest.fixture
def change() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The socket that tells of changes, and its other end."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        yield near, far


@pytest.fixture
def walls(
    event_loop: EventLoop, change: tuple[socket.socket, socket.socket], children: list[Child]
) -> Built:
    return Built(event_loop, change[0], children)


@pytest.fixture
def recorded(walls: Built, monkeypatch: pytest.MonkeyPatch) -> Built:
    """Walls of which only the programs are kept: no process here has a tap device."""
    monkeypatch.setattr(wall, "build", walls.record)
    return walls


def behind_gateway(child: Child, gateway: Child) -> Child:
    """A child with a private network, whose gateway is the process of another one."""
    child.gateway, child.layout = gateway.pidfd, choose_layout(())
    return child


def test_started_jobs_get_new_walls_when_the_hosts_addresses_change(
    recorded: Built,
    start_child: StartChild,
    children: list[Child],
    change: tuple[socket.socket, socket.socket],
) -> None:
    gateway = start_child()
    started, starting = (behind_gateway(start_child(), gateway) for _ in range(2))
    starting.sock = change[1]
    children += [started, starting, start_child()]
    change[1].send(b"!")
    recorded.event_loop.run_once()
    assert recorded.built == [(gateway.pidfd, b"first")]
    assert started.wall == b"first"
    assert starting.wall == b"", "it gets its wall when its start is done"


def test_addresses_that_cannot_be_read_are_read_again(
    recorded: Built,
    start_child: StartChild,
    children: list[Child],
    change: tuple[socket.socket, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walls_module, "LOOK_AGAIN_SECONDS", 0)
    children.append(behind_gateway(start_child(), start_child()))
    recorded.host.fails = True
    recorded.walls._on_addresses()
    recorded.host.fails = False
    change[1].send(b"!")
    recorded.event_loop.unwatch(change[0].fileno())
    recorded.event_loop.run_once()
    assert len(recorded.built) == 1


def test_wall_that_would_be_the_same_is_not_built_again(
    recorded: Built, start_child: StartChild
) -> None:
    child = behind_gateway(start_child(), start_child())
    for _ in range(2):
        recorded.walls.build(child)
    assert len(recorded.built) == 1
    recorded.host.program = b"second"
    recorded.walls.build(child)
    assert [program for _, program in recorded.built] == [b"first", b"second"]


@pytest.mark.parametrize("lacks", ["gateway", "layout", "life"])
def test_child_without_a_gateway_or_after_its_end_has_no_wall(
    recorded: Built, start_child: StartChild, lacks: str
) -> None:
    child = behind_gateway(start_child(), start_child())
    if lacks == "life":
        child.exit = ChildExit(0, None)
    else:
        setattr(child, lacks, None)
    recorded.walls.build(child)
    assert not recorded.built


def test_gateway_that_no_wall_can_be_built_for_is_killed(
    walls: Built, start_child: StartChild
) -> None:
    """It has no tap device, as the kernel finds."""
    gateway = start_child()
    child = behind_gateway(start_child(), gateway)
    walls.walls.build(child)
    ended = os.waitid(os.P_PIDFD, gateway.pidfd, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_status == signal.SIGKILL
    assert child.network_end.startswith("the host's new addresses could not be closed to it: ")
    assert child.wall == b""


def test_gateway_that_has_ended_is_no_fault(walls: Built, start_child: StartChild) -> None:
    gateway = start_child("true")
    os.waitid(os.P_PIDFD, gateway.pidfd, os.WEXITED)
    child = behind_gateway(start_child(), gateway)
    walls.walls.build(child)
    assert child.network_end == ""
    assert child.wall == b""


def test_job_that_goes_on_without_its_network_is_told(
    walls: Built, start_child: StartChild
) -> None:
    child = start_child()
    child.job = 5
    walls.walls.tell_end(child, "it ended")
    assert walls.told == [{"event": "network_ended", "job": 5, "why": "it ended"}]
    assert child.network_end == "it ended", "for the next service"


def test_reason_that_is_known_already_is_told(walls: Built, start_child: StartChild) -> None:
    child = start_child()
    child.job, child.network_end = 5, "no wall"
    walls.walls.tell_end(child, "its slirp4netns ended by signal 9")
    assert [told["why"] for told in walls.told] == ["no wall"]


@pytest.mark.parametrize(
    "state", [{"exit": ChildExit(0, None)}, {"job": None}, {"doomed": True}], ids=str
)
def test_end_of_a_network_is_not_told_of_a_job_that_ends(
    walls: Built, start_child: StartChild, state: dict[str, object]
) -> None:
    child = start_child()
    child.job = 5
    for name, value in state.items():
        setattr(child, name, value)
    walls.walls.tell_end(child, "it ended")
    assert not walls.told
    assert child.network_end == ""
