"""A child from the launcher's side: what is kept of an order that was sent, and how it ended."""

import errno
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import closing

from jobworker.sandbox.cgroup.none import NoTree
from jobworker.sandbox.launcher.child import Child, ChildExit, status_of
from jobworker.sandbox.network import gateway
from jobworker.sandbox.start import trampoline
from jobworker.sandbox.start.plan import Slot

from .conftest import new_child

EXECUTE = trampoline.STEPS.index("execute")


def test_variables_of_a_job_are_not_kept_once_its_order_is_sent() -> None:
    child = Child(Slot("job", 1, 1), 0, NoTree("none", "").create("job"))
    child.order = os.memfd_create("order")
    child.sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    image = b"PASSWORD=secret" * 1000
    before = sys.getrefcount(image)
    with closing(child.sock), other:
        child.send(trampoline.ExecImage(image, "/", "true", ("/bin/true",)))
        assert sys.getrefcount(image) == before
        other.send(struct.pack("<5i", ord(trampoline.FAILURE), EXECUTE, -errno.ENOENT, 0, 0))
        message = child.hear()
    failure = {"step": "execute", "errno": errno.ENOENT, "detail": "/bin/true"}
    assert message == {"failed": failure}, "its names are still told"


def test_end_that_a_tracer_hears_first_is_not_waited_for(
    traced: tuple[int, Callable[[], None]],
) -> None:
    child = new_child(0)
    child.pidfd, let_go = traced
    assert status_of(child) is None
    assert gateway.reap(child.pidfd) is None
    let_go()
    assert os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT) is not None
    assert status_of(child) == ChildExit(None, signal.SIGKILL)
    assert gateway.reap(child.pidfd) == "its slirp4netns ended by signal 9"
