"""The gateway of a private network: a process beside the job that makes the job's network.

    launcher ─clone─► gateway (root)      enters its own root and the job's scope, makes a user
                        │                 namespace
                        ├─clone─► maker   enters that namespace, makes the network, exits
                        └─exec──► slirp4netns, which has no rights outside and owns only the network

What must hold: the gateway has its own process, mount, IPC and UTS namespaces, a user id that no
job and no other gateway has, and none of the launcher's descriptors. It is in the job's scope
before its program runs. The launcher waits for nothing that it does. Until it executes slirp4netns
its memory is a copy of the launcher's, so until then it reads nothing that the job can write.

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
from jobworker.sandbox.cgroup.hierarchy import JobScope
from jobworker.sandbox.network.slirp import Layout
from jobworker.sandbox.start import network
from jobworker.sandbox.start.plan import RootView
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
"""The gateway's capabilities, which hold in its own user namespace. slirp4netns drops all but
NET_BIND_SERVICE once it has made its own sandbox."""
_DEVICES = {"null": (1, 3), "net/tun": (10, 200)}
_NAMESPACES = sc.CLONE_NEWPID | sc.CLONE_NEWNS | sc.CLONE_NEWIPC | sc.CLONE_NEWUTS
_LOG = "dev/log"
"""The file that takes the output of slirp4netns."""


class GatewayParameters(NamedTuple):
    """The parameters of a gateway."""

    layout: Layout
    program: str
    """The path of slirp4netns in the gateway's root."""
    view: RootView
    """The view of the host's programs."""
    uid: int
    """The gateway's user id outside."""
    scope: JobScope
    """The job's scope."""
    landlock: int | None
    """The ruleset of `sandbox.start.landlock`; None if the kernel cannot scope."""


def start_gateway(parameters: GatewayParameters) -> tuple[int, int, int]:
    """Clone a gateway: its pid and pidfd, and a socket whose reader is
    `start.private_network.enter`.

    The caller owns both descriptors. The gateway is a child of the caller's parent, which reaps
    it: see `sandbox.fork_server`. Raises OSError.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far:
        try:
            pid, pidfd = sc.clone3(_NAMESPACES | sc.CLONE_PARENT)
        except OSError:
            near.close()
            raise
        if pid == 0:
            _become_gateway(parameters, far.fileno())
    return pid, pidfd, near.detach()


def reap(pidfd: int) -> str | None:
    """Reap a gateway whose pidfd is readable, close the pidfd, and return how it ended, as text.

    Returns None if it cannot be reaped yet, because a debugger on the host traces it.
    """
    info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    if info is None:
        return None
    os.close(pidfd)
    how = "with code" if info.si_code == os.CLD_EXITED else "by signal"
    return f"its {PROGRAM} ended {how} {info.si_status}"


def _become_gateway(parameters: GatewayParameters, descriptor: int) -> NoReturn:
    """In the cloned process: make the network, send it to the job's process, run slirp4netns."""
    try:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as link:
            _run(parameters, link)
    finally:
        os._exit(127)


def _run(parameters: GatewayParameters, link: socket.socket) -> None:
    try:
        os.setsid()
        if parameters.landlock is not None:
            sc.landlock_restrict_self(parameters.landlock)
        _enter_root(parameters.view)
        own = make_user_namespace(parameters.uid, 1)
        namespace = _make_network(parameters.layout, own)
        parameters.scope.attach_self(cloned=False)
        ready, notify = os.pipe2(os.O_CLOEXEC)
        log = os.open(f"/{_LOG}", os.O_RDWR | os.O_CLOEXEC)
        channel.send(link, {}, [namespace, ready, log])
        _become_root_of(own)
        sc.capset(_CAPABILITIES)
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open("/dev/null", os.O_RDWR)
        _arrange_descriptors((null, null, log, namespace, notify))
        arguments = [
            PROGRAM,
            *_OPTIONS,
            f"--cidr={parameters.layout.prefix}.0/24",
            "/proc/self/fd/3",
        ]
        os.execve(parameters.program, [*arguments, TAP], {"PATH": "/usr/bin:/bin"})  # noqa: S606
    except OSError as error:
        channel.send(link, {"errno": error.errno or 0, "detail": str(error.filename or error)})


def _enter_root(view: RootView) -> None:
    """Enter a root with the host's programs, the devices of `_DEVICES`, a /proc and no more."""
    root = ROOT
    for layer in view.layers:
        sc.mount(layer.lower[-1], root + layer.at, None, sc.MS_BIND)
    private = sc.MS_NOSUID | sc.MS_NOEXEC
    sc.mount("tmpfs", f"{root}/dev", "tmpfs", private, "mode=755,size=64k")
    os.mkdir(f"{root}/dev/net", 0o755)
    for name, (major, minor) in _DEVICES.items():
        os.mknod(f"{root}/dev/{name}", 0o020600, os.makedev(major, minor))
        os.chmod(f"{root}/dev/{name}", 0o666)  # noqa: S103 - there is one user here
    os.close(os.open(f"{root}/{_LOG}", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
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
    """Move `wanted` to the numbers from 0 on, and close all other descriptors."""
    copies = [os.dup(descriptor) for descriptor in wanted]
    highest = max(copies) + 1
    parked = [os.dup2(each, highest + number) for number, each in enumerate(copies)]
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
