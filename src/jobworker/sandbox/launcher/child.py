"""One child of the launcher: a process on its way to becoming a job, or a job.

A child owns a slot: a range of ids, a scope, a place on disk and two pipes. `children` makes it and
takes back what it had. Here stands what the launcher knows of it, what it hears from it, and how it
ended.

Standard library only.
"""

import errno
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from jobworker.sandbox import channel
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.cgroup.hierarchy import Scope, Usage
from jobworker.sandbox.cgroup.scope import Want
from jobworker.sandbox.channel import Message, close_all
from jobworker.sandbox.disk.images import Disk
from jobworker.sandbox.network.slirp import Layout
from jobworker.sandbox.protocol.asks import Asked
from jobworker.sandbox.protocol.requests import Spawn
from jobworker.sandbox.start import init_program, trampoline
from jobworker.sandbox.start.plan import Slot


class Exit(NamedTuple):
    """How a child's first process ended: one of the two is None."""

    code: int | None
    signal: int | None


_AS_MUCH = (channel.PACKET_BYTES, channel.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)


class Start(NamedTuple):
    """A start that a child is made for."""

    number: int
    """That of its request."""
    request: Spawn
    errand: trampoline.Errand
    by: int
    """When it is given up: at which look at starts."""


NOBODY = -1
"""The request of a start whose service has gone: nobody is told what becomes of it."""
NO_ERRAND = trampoline.Errand(b"", "", "", ())


class Child:
    """A process on its way to becoming a job, or a job."""

    asked: Asked | None = None
    """What was asked for of its end, for the next service."""
    start_by = 0
    """When its start is given up: at which look at starts (`launcher.jobs`)."""
    start: Start | None = None
    """What it becomes once it is made; None afterwards, and for a spare."""
    end_is_taken = is_clearing = False
    """Whether its last words were heard and its losses are looked for: then what it held may go.
    And whether it is going."""

    def __init__(self, slot: Slot, index: int, scope: Scope) -> None:
        self.slot, self.index, self.scope = slot, index, scope
        self.pid = self.pidfd = self.stdout = self.stderr = -1
        self.disk: Disk | None = None
        self.root: int | None = None
        """The root that it sees, on its disk."""
        self.volume_roots: dict[str, int] = {}
        """The roots of its volumes, by name."""
        self.thin_volumes: set[str] = set()
        """Those of them that take from the disk below what is written."""
        self.sock: socket.socket | None = None
        """Open until the program is executed, or the process has ended."""
        self.job: int | None = None
        """The job that it was ordered to become; None for a spare."""
        self.request: int | None = None
        """The request to answer once the program runs or the start has failed; or `NOBODY`."""
        self.ready = self.shares = False
        """It has said that it awaits its order: only then is the end of its socket a start. And it
        has had volumes: through a socket there it may have given its descriptors to others."""
        self.started_at = self.ended_at = 0.0
        """When its program was executed and when it was reaped, by the monotonic clock."""
        self.order = -1
        """Memory for the order, open until it is given."""
        self._errand = NO_ERRAND
        self.failure: Message | None = None
        self.gateway: int | None = None
        """The pidfd of its network's gateway, until that is reaped."""
        self.layout: Layout | None = None
        self.wall, self.network_end = b"", ""
        """The program that keeps it away from the host, where it has a gateway. And why its network
        has ended, where that came before its own end."""
        self.report = -1
        """What its init tells of the program's end; -1 where it has none."""
        self.hoards = False
        """It was ended for kernel memory that no group counts: see
        `sandbox.launcher.kernel_watch`."""
        self.exit: Exit | None = None
        self.lost, self.unseen = list[str](), list[str]()
        """Where it lost what it wrote: names of volumes, "" for its own disk. And the volumes of
        which that could not be found out."""
        self.inspected, self.inspections = False, 0
        """Whether its volumes are being written out for that, and how often that was begun."""
        self.end_is_known = False
        """Whether that, too, is known of its end."""
        self.doomed = False
        """It was killed, or has ended: its slot is about to become free."""
        self.final_want: Want = ""
        """What it wanted memory of by its end, as `want` tells while it lives."""
        self.final_usage: Usage | None = None
        """What it had used when it ended; its scope is gone soon after."""
        self.when_cleared: Callable[[], None] | None = None
        """Called once nothing of it is left but its pipes."""
        self.volumes: tuple[str, ...] = ()
        """The names of those that it has."""

    def send(self, errand: trampoline.Errand) -> None:
        """Have the child go on to execute the job's program. Raises OSError."""
        self._errand = errand
        if self.sock is None:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        written = 0
        while written < len(errand.image):
            written += os.pwrite(self.order, errand.image[written:], written)
        self.sock.send(trampoline.GO, socket.MSG_NOSIGNAL)
        os.close(self.order)
        self.order = -1

    def hear(self) -> Message | None:
        """What the child says; None at the end of the stream: it has executed, or has ended.

        Raises BlockingIOError where it says nothing, OSError, ProtocolError.
        """
        assert self.sock is not None
        try:
            packet, ancillary, flags, _ = self.sock.recvmsg(*_AS_MUCH)
        except ConnectionResetError:  # told once, and before what waits to be read
            packet, ancillary, flags, _ = self.sock.recvmsg(*_AS_MUCH)
        if not packet and not ancillary:
            return None
        if packet.startswith(trampoline.FAILURE):
            return {"failed": trampoline.failure_from(packet, self._errand)}
        message, descriptors = channel.decode(packet, ancillary, flags)
        name = message.get("volume")
        if "disk" in message and self.disk is None and len(descriptors) == 2:
            self.disk, descriptors = Disk(*descriptors), []
        elif "root" in message and self.root is None and descriptors:
            self.root = descriptors.pop()
        elif name in self.volumes and name not in self.volume_roots and descriptors:
            self.volume_roots[str(name)] = descriptors.pop()
            if message.get("thin") is True:
                self.thin_volumes.add(str(name))
        close_all(descriptors)
        return message

    @property
    def is_alive(self) -> bool:
        """Whether it has a process that has not ended."""
        return self.pidfd >= 0 and self.exit is None

    def usage(self) -> Usage:
        """What it has used. Raises OSError where that cannot be read."""
        if self.final_usage is not None:
            return self.final_usage
        if self.pidfd < 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        usage = self.scope.usage()
        return usage._replace(oom_kills=max(1, usage.oom_kills)) if self.hoards else usage

    def want(self) -> Want:
        """For want of what memory processes of it were killed; "" where none was."""
        if self.hoards:
            return "kernel"
        if self.pidfd < 0:
            return ""
        try:
            if not self.scope.oom_kills():
                return ""
            return "limit" if self.scope.is_over_limit() else "host"
        except OSError:
            return ""


def name_host(child: Child, name: str) -> None:
    """Name the host that a child sees, from outside: it has no right to; uts_namespaces(7).

    Raises OSError. The launcher itself is in no other namespace meanwhile than the child's.
    """
    own = os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
    try:
        sc.setns(child.pidfd, sc.CLONE_NEWUTS)
        try:
            socket.sethostname(name)
        finally:
            sc.setns(own, sc.CLONE_NEWUTS)
    finally:
        os.close(own)


def status_of(child: Child) -> Exit | None:
    """How a child ended whose pidfd is readable; it is still to be collected (`Zombies`).

    None where the kernel does not tell yet: a tracer of the host's hears it first (ptrace(2)).
    """
    info = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if info is None:
        return None
    told = None if child.report < 0 else init_program.reported(child.report)
    if told is not None:
        return Exit(*told)
    if info.si_code == os.CLD_EXITED:
        return Exit(info.si_status, None)
    return Exit(None, info.si_status)
