"""One child of the launcher: a process on its way to becoming a job, or a job.

A child owns a slot: a range of ids, a scope, a directory on disk and two pipes. `launcher.children`
makes it and releases what it had. This module has the launcher's state of a child, reads the
child's messages and its exit status.

Standard library only.
"""

import errno
import os
import select
import socket
from collections.abc import Callable
from typing import NamedTuple

from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.accounting import Want
from jobworker.sandbox.cgroup.hierarchy import JobScope, ScopeUsage
from jobworker.sandbox.channel import Message, close_all
from jobworker.sandbox.disk.images import Disk
from jobworker.sandbox.network.slirp import Layout
from jobworker.sandbox.protocol.end_requests import EndRequestLog
from jobworker.sandbox.protocol.requests import Spawn
from jobworker.sandbox.start import init_program, trampoline
from jobworker.sandbox.start.plan import Slot


class ChildExit(NamedTuple):
    """How a child's first process ended: by an exit code or by a signal. The other is None."""

    code: int | None
    signal: int | None


_AS_MUCH = (channel.PACKET_BYTES, channel.ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)


class PendingStart(NamedTuple):
    """A start of a job that waits for its child to be made."""

    number: int
    """The number of the request."""
    request: Spawn
    exec_image: trampoline.ExecImage
    by: int
    """The count of `Starts._look_at_starts` at which the launcher gives it up."""


NOBODY = -1
"""The request number of a start whose service has gone: the start is not answered."""
NO_IMAGE = trampoline.ExecImage(b"", "", "", ())


class Child:
    """A process on its way to becoming a job, or a job."""

    asked: EndRequestLog | None = None
    """The end that a service has asked for, kept so that the next service finds it."""
    start_by = 0
    """The count of `Starts._look_at_starts` at which the launcher gives its start up."""
    start: PendingStart | None = None
    """The start that it is made for; None once it is made, and for a spare."""
    end_is_taken = is_clearing = False
    """`end_is_taken`: its last messages were read and the search for lost writes has begun, so what
    it held may be released. `is_clearing`: that release has begun."""

    def __init__(self, slot: Slot, index: int, scope: JobScope) -> None:
        self.slot, self.index, self.scope = slot, index, scope
        self.pid = self.pidfd = self.stdout = self.stderr = -1
        self.disk: Disk | None = None
        self.root: int | None = None
        """A descriptor of its root directory, which is on its disk."""
        self.volume_roots: dict[str, int] = {}
        """A descriptor of the root directory of each volume, by the volume's name."""
        self.thin_volumes: set[str] = set()
        """The names of its volumes that take space of the host's disk only as they are written."""
        self.sock: socket.socket | None = None
        """The launcher's end of its socket, open until it executes the program or ends."""
        self.job: int | None = None
        """The job that it is to become or is; None for a spare."""
        self.request: int | None = None
        """The number of the request to answer when the program runs or the start has failed; None
        if there is none, `NOBODY` if its service has gone."""
        self.ready = self.shares = False
        """`ready`: it has reported that it waits for its order. Only after that does the end of its
        socket mean that the program was executed. `shares`: it has had volumes, so it may have sent
        descriptors to other jobs over a UNIX socket there."""
        self.started_at = self.ended_at = 0.0
        """When its program was executed and when its exit status was read (monotonic, seconds)."""
        self.order, self._exec_image, self.host_name = -1, NO_IMAGE, ""
        """`order`: the memfd for its order, open until the order is sent. `host_name`: the host
        name that it has, as a spare; "" while that is not known."""
        self.failure: Message | None = None
        self.gateway: int | None = None
        """The pidfd of its network's gateway until the gateway is reaped; None without one."""
        self.layout: Layout | None = None
        self.wall, self.network_end = b"", ""
        """`wall`: the packet filter between it and its gateway, empty without a gateway.
        `network_end`: why its network has ended before the job; "" otherwise."""
        self.report = -1
        """The pipe in which its init reports how the program ended; -1 if it has no init."""
        self.hoards = False
        """The launcher has ended it for kernel memory that no control group counts
        (`sandbox.launcher.kernel_watch`)."""
        self.exit: ChildExit | None = None
        """How it ended; None while it lives."""
        self.lost, self.unseen = list[str](), list[str]()
        """`lost`: where it lost writes, by the name of the volume, "" for its own disk. `unseen`:
        the volumes for which the launcher could not find that out."""
        self.inspected, self.inspections = False, 0
        """`inspected`: a process is now writing out its volumes to find lost writes. `inspections`:
        how many such processes have ended."""
        self.end_is_known = False
        """Whether all of its end is known, lost writes included."""
        self.doomed = self.was_killed = False
        """`doomed`: it was killed or has ended, so its slot is about to become free. `was_killed`:
        the launcher has killed it."""
        self.final_want: Want = ""
        """The result of `want` at its end."""
        self.final_usage: ScopeUsage | None = None
        """The result of `usage` at its end, kept because its scope is removed soon after."""
        self.when_cleared: Callable[[], None] | None = None
        """Called when nothing of it is left but its pipes."""
        self.volumes: tuple[str, ...] = ()
        """The names of its volumes."""

    def send(self, exec_image: trampoline.ExecImage) -> None:
        """Send the child its order, so that it executes the job's program. Raises OSError."""
        # A report of a failure needs its names. The job's variables are not kept while it runs.
        self._exec_image = exec_image._replace(image=b"")
        if self.sock is None:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
        written = 0
        while written < len(exec_image.image):
            written += os.pwrite(self.order, exec_image.image[written:], written)
        self.sock.send(trampoline.GO, socket.MSG_NOSIGNAL)
        os.close(self.order)
        self.order = -1

    def hear(self) -> Message | None:
        """Read one message of the child, and keep the descriptors in it.

        Returns None at the end of the stream: the child has executed the program or has ended.
        Raises BlockingIOError if no message is waiting, OSError and ProtocolError.
        """
        assert self.sock is not None
        try:
            packet, ancillary, flags, _ = self.sock.recvmsg(*_AS_MUCH)
        except ConnectionResetError:  # reported once, before the messages that are still unread
            packet, ancillary, flags, _ = self.sock.recvmsg(*_AS_MUCH)
        if not packet and not ancillary:
            return None
        if packet.startswith(trampoline.FAILURE):
            return {"failed": trampoline.failure_from(packet, self._exec_image)}
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

    def has_ended(self) -> bool:
        """Whether its process has ended, even if the event loop has not taken its end yet."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def usage(self) -> ScopeUsage:
        """What the job has used. Raises OSError if the counters cannot be read."""
        if self.final_usage is not None:
            return self.final_usage
        if self.pidfd < 0:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        usage = self.scope.usage()
        return usage._replace(oom_kills=max(1, usage.oom_kills)) if self.hoards else usage

    def want(self) -> Want:
        """Which memory was missing when the kernel or launcher killed a process of it; "" if none.

        The values are those of `Want`.
        """
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


def status_of(child: Child) -> ChildExit | None:
    """How a child ended whose pidfd is readable. The child is not reaped yet: see `Zombies`.

    Returns None if the kernel does not give the status yet, because a tracer on the host is
    notified first (ptrace(2)).
    """
    info = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if info is None:
        return None
    told = None if child.report < 0 else init_program.reported(child.report)
    if told is not None:
        return ChildExit(*told)
    if info.si_code == os.CLD_EXITED:
        return ChildExit(info.si_status, None)
    return ChildExit(None, info.si_status)
