"""The gateway of a private network: a process beside the job that makes it and speaks for it.

    launcher ─clone─► gateway (root)      a root of its own, a user namespace, the job's scope
                        ├─clone─► maker   enters that namespace, makes the network, is gone
                        └─exec──► slirp4netns, nobody outside and root of nothing but the network

What must hold: the gateway has process, mount, IPC and UTS namespaces of its own, an id that no job
and no other gateway has, and no descriptor of ours; it counts as part of the job from before its
program runs; nothing of it waits in the launcher. Its memory is a copy of the launcher's until it
executes its program, so it takes nothing from the job before that.

Standard library only.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from jobworker.sandbox import channel, netlink
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.capabilities import Capability
from jobworker.sandbox.cgroup.hierarchy import Scope
from jobworker.sandbox.network.slirp import Layout
from jobworker.sandbox.start import network
from jobworker.sandbox.start.plan import View
from jobworker.sandbox.start.private_network import PROGRAM, TAP
from jobworker.sandbox.start.steps import ROOT
from jobworker.sandbox.user_namespaces import make_user_namespace

_OPTIONS = (
    *("--configure", "--mtu=65520", "--disable-host-loopback"),
    *("--enable-sandbox", "--enable-seccomp", "--ready-fd=4", "--netns-type=path"),
)
_CAPABILITIES = frozenset(
    {
        Capability.SETPCAP,
        Capability.NET_BIND_SERVICE,
        Capability.NET_ADMIN,
        Capability.SYS_ADMIN,
    }
)
"""What a gateway has over its own user namespace. slirp4netns keeps NET_BIND_SERVICE alone once it
has made its own sandbox."""
_DEVICES = {"null": (1, 3), "net/tun": (10, 200)}
_NAMESPACES = sc.CLONE_NEWPID | sc.CLONE_NEWNS | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS
_SAID = "dev/said"


class Means(NamedTuple):
    """What a gateway needs."""

    layout: Layout
    program: str
    """Its path as the gateway sees it."""
    view: View
    """Where the host's programs stand."""
    uid: int
    scope: Scope
    landlock: int | None


def start_gateway(means: Means) -> tuple[int, int]:
    """Clone a gateway: its pidfd, and a socket whose reader is `start.private_network.enter`.

    The caller owns both, and reaps it. Raises OSError.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        try:
            pid, pidfd = sc.clone3(_NAMESPACES)
        except OSError:
            near.close()
            raise
        if pid == 0:
            _become_gateway(means, far.fileno())
    return pidfd, near.detach()


def reap(pidfd: int) -> str | None:
    """Collect a gateway whose pidfd is readable, and close that: how it ended, in words.

    None where it cannot be collected yet: a tracer of the host's has it.
    """
    info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    if info is None:
        return None
    os.close(pidfd)
    how = "with code" if info.si_code == os.CLD_EXITED else "by signal"
    return f"its {PROGRAM} ended {how} {info.si_status}"


def _become_gateway(means: Means, descriptor: int) -> NoReturn:
    """In the cloned process: make the network, hand it over, become slirp4netns."""
    try:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as link:
            _run(means, link)
    finally:
        os._exit(127)


def _run(means: Means, link: socket.socket) -> None:
    try:
        os.setsid()
        if means.landlock is not None:
            sc.landlock_restrict_self(means.landlock)
        _enter_root(means.view)
        own = make_user_namespace(means.uid, 1)
        namespace = _make_network(means.layout, own)
        means.scope.attach_self(cloned=False)
        ready, tell = os.pipe2(os.O_CLOEXEC)
        said = os.open(f"/{_SAID}", os.O_RDWR | os.O_CLOEXEC)
        channel.send(link, {}, [namespace, ready, said])
        _become_root_of(own)
        sc.capset(_CAPABILITIES)
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open("/dev/null", os.O_RDWR)
        _arrange_descriptors((null, null, said, namespace, tell))
        arguments = [PROGRAM, *_OPTIONS, f"--cidr={means.layout.prefix}.0/24", "/proc/self/fd/3"]
        os.execve(means.program, [*arguments, TAP], {"PATH": "/usr/bin:/bin"})  # noqa: S606
    except OSError as error:
        channel.send(link, {"errno": error.errno or 0, "detail": str(error.filename or error)})


def _enter_root(view: View) -> None:
    """Keep the host's programs and libraries, devices for a tunnel, a /proc, and nothing else."""
    root = ROOT
    for layer in view.layers:
        sc.mount(layer.lower[-1], root + layer.at, None, sc.MS_BIND)
    private = sc.MS_NOSUID | sc.MS_NOEXEC
    sc.mount("tmpfs", f"{root}/dev", "tmpfs", private, "mode=755,size=64k")
    os.mkdir(f"{root}/dev/net", 0o755)
    for name, (major, minor) in _DEVICES.items():
        os.mknod(f"{root}/dev/{name}", 0o020600, os.makedev(major, minor))
        os.chmod(f"{root}/dev/{name}", 0o666)  # noqa: S103 - there is one user here
    os.close(os.open(f"{root}/{_SAID}", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    sc.mount("proc", f"{root}/proc", "proc", private | sc.MS_NODEV)
    os.chdir(root)
    sc.pivot_root(".", ".")
    sc.umount(".")
    os.chdir("/")


def _become_root_of(user_namespace: int) -> None:
    sc.setns(user_namespace, sc.CLONE_NEWUSER)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _arrange_descriptors(wanted: Sequence[int]) -> None:
    """Leave these open, at 0 and up, and no others."""
    away = [os.dup(descriptor) for descriptor in wanted]
    highest = max(away) + 1
    parked = [os.dup2(each, highest + number) for number, each in enumerate(away)]
    for number, descriptor in enumerate(parked):
        os.dup2(descriptor, number, inheritable=True)
    sc.close_range(len(wanted))


def _make_network(layout: Layout, user_namespace: int) -> int:
    """A descriptor of a new network namespace that belongs to `user_namespace`."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        pid, pidfd = sc.clone3(0)
        if pid == 0:
            _make_and_send(layout, user_namespace, far)
        far.close()
        try:
            received = channel.receive(near)
        finally:
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
    if received is None:
        raise OSError(0, "the process that makes the network has ended")
    message, descriptors = received
    if not descriptors:
        code = message.get("errno")
        assert isinstance(code, int)
        raise OSError(code, os.strerror(code))
    return descriptors[0]


def _make_and_send(layout: Layout, user_namespace: int, far: socket.socket) -> NoReturn:
    try:
        _become_root_of(user_namespace)
        sc.unshare(sc.CLONE_NEWNET)
        network.bring_up("lo")
        network.keep_to_ipv4()
        netlink.refuse_connections(layout.resolver, 100, port_left=53)
        netlink.refuse_connections(layout.gateway, 102)
        netlink.refuse_connections(f"{layout.prefix}.0", 104, length=24)
        for address in layout.host_addresses:
            netlink.refuse_destination(address)
        namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        channel.send(far, {}, [namespace])
    except OSError as error:
        channel.send(far, {"errno": error.errno or 0})
    finally:
        os._exit(0)
