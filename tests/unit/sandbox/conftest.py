"""A process that has ended and cannot be collected yet; a fork server; control groups."""

import ctypes
import os
import select
import signal
from collections.abc import Callable, Iterator

import pytest

from jobworker.errors import HostUnsupported
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.files import subgroups
from jobworker.sandbox.cgroup.hierarchy import Tree, open_tree
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer

_PTRACE_SEIZE = 0x4206


@pytest.fixture
def event_loop() -> EventLoop:
    """An event loop, whose turns the test takes."""
    return EventLoop()


@pytest.fixture
def forks(event_loop: EventLoop) -> Iterator[ForkServer]:
    """A fork server that is asked in this loop."""
    made = ForkServer(event_loop, {})
    yield made
    made.close()


@pytest.fixture
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """A tree of control groups with the controllers that the parameter names, or pids alone.

    All scopes in it are removed in the end, with their processes.
    """
    controllers = getattr(request, "param", ("pids",))
    try:
        made = open_tree(controllers, f"jobworker-unit-{os.getpid()}")
    except HostUnsupported as error:
        pytest.skip(f"the kernel lets this user make no control group: {error}")
    yield made
    for top in made.tops:
        for name in subgroups(top):
            made.forget(name)
    made.sweep()
    made.close()


@pytest.fixture
def traced() -> Iterator[tuple[int, Callable[[], None]]]:
    """The pidfd of a killed child that another process traces, and what ends that process.

    The descriptor is readable, and waitid(2) waits for the tracer: ptrace(2). Who takes the
    fixture collects the child.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pause()
        os._exit(0)
    pidfd = os.pidfd_open(child)
    told, tell = os.pipe2(os.O_CLOEXEC)
    tracer = os.fork()
    if tracer == 0:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(tell, bytes([libc.ptrace(_PTRACE_SEIZE, child, None, None) == 0]))
        signal.pause()
        os._exit(0)
    traces = os.read(told, 1) == b"\1"
    os.close(told)
    os.close(tell)
    os.kill(child, signal.SIGKILL)

    def let_go() -> None:
        nonlocal tracer
        if tracer:
            os.kill(tracer, signal.SIGKILL)
            os.waitpid(tracer, 0)
            tracer = 0

    if not traces:
        let_go()
        os.waitpid(child, 0)
        os.close(pidfd)
        pytest.skip("this host lets no process trace another")
    select.select([pidfd], [], [])
    assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    yield pidfd, let_go
    let_go()
