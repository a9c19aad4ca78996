"""Children of the launcher with real processes, and a pool that makes none by itself."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.cgroup.none import NoTree
from jobworker.sandbox.channel import Message
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.scopes import Scopes
from jobworker.sandbox.launcher.sweepers import Sweepers
from jobworker.sandbox.start.plan import Order, Slot

StartChild = Callable[..., Child]


@pytest.fixture
def start_child() -> Iterator[StartChild]:
    """Starts a command as the first process of a child that has no control group.

    It returns once the command has written a line, if `says` is true.
    """
    processes: list[tuple[subprocess.Popen[bytes], int]] = []

    def start(*command: str, says: bool = False) -> Child:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command or ("sleep", "600"), stdin=pipe, stdout=pipe)
        assert process.stdout is not None
        if says:
            process.stdout.readline()
        number = len(processes)
        child = new_child(number)
        child.pid, child.pidfd = process.pid, os.pidfd_open(process.pid)
        processes.append((process, child.pidfd))
        return child

    yield start
    for process, pidfd in processes:
        os.close(pidfd)
        with process:
            process.kill()


def new_child(number: int) -> Child:
    """A child that has no process yet."""
    return Child(Slot(f"job-{number}", 1, 1), number, NoTree("none", "").create("job"))


class HostNames:
    """What is asked of the process that sets host names."""

    def __init__(self) -> None:
        self.next = ""
        self.asked: list[tuple[int, str, Callable[[Message], None]]] = []
        self.ahead: list[Child] = []

    def set(self, pidfd: int, name: str, done: Callable[[Message], None]) -> None:
        self.asked.append((pidfd, name, done))

    def name_ahead(self, child: Child) -> None:
        self.ahead.append(child)


class QuietPool:
    """A pool whose children get a process, and are cleared away, when the test says so."""

    def __init__(self, event_loop: EventLoop, forks: ForkServer, changes: socket.socket) -> None:
        self.event_loop, self.forks = event_loop, forks
        self.scopes, self.sweepers = Scopes(event_loop, forks), Sweepers(event_loop, forks)
        self.networks = SimpleNamespace(changes=changes)
        self.host_names = HostNames()
        self.slots = self.free = 3
        self.usual_disk_bytes, self.overcommits, self.is_idle = 1 << 20, False, True
        self.asked: list[tuple[Child, Order | None]] = []
        """The children that were asked for, each with its order, None for a spare."""
        self.answers: dict[Child, Callable[[Child, Message | None], None]] = {}
        self.clearing: dict[Child, Callable[[], None]] = {}

    @property
    def given(self) -> ChildPool:
        return cast("ChildPool", self)

    def has_room(self) -> bool:
        return self.free > 0

    def make(self, order: Order | None, on_made: Callable[[Child, Message | None], None]) -> Child:
        child = new_child(len(self.asked))
        self.free -= 1
        self.asked.append((child, order))
        self.answers[child] = on_made
        return child

    def answer(self, child: Child, process: Child) -> socket.socket:
        """Give a child that was asked for this process. Returns the child's end of its socket."""
        child.pid, child.pidfd = process.pid, process.pidfd
        child.sock, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child.sock.setblocking(False)
        child.order = os.memfd_create("order", os.MFD_CLOEXEC)
        self.answers.pop(child)(child, None)
        return far

    def refuse(self, child: Child, failure: Message) -> None:
        """Let a child that was asked for be made by no one."""
        self.answers.pop(child)(child, failure)

    def clear(self, child: Child, done: Callable[[], None]) -> None:
        self.clearing[child] = done

    def end_clearing(self, child: Child) -> None:
        """Have nothing left of a child that is being cleared away."""
        self.free += 1
        self.clearing.pop(child)()

    def discard_disk(self, child: Child) -> None:
        pass

    def release_volumes(self, child: Child) -> None:
        pass

    def close_pipes(self, child: Child) -> None:
        pass


@pytest.fixture
def pool(event_loop: EventLoop, forks: ForkServer) -> Iterator[QuietPool]:
    """A pool of three slots."""
    near, far = socket.socketpair()
    with near, far:
        yield QuietPool(event_loop, forks, near)


def pass_turns_until(event_loop: EventLoop, condition: Callable[[], object]) -> None:
    """Take turns of the loop until a condition holds."""
    while not condition():
        event_loop.run_once()
