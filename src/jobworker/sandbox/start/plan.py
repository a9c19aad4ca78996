"""Makes the plan of a start: an ordered tuple of steps, from an order and the launcher's policy.

Pure: no clock, no I/O, no privilege; the same input gives the same steps. A plan has two halves.
`prepare` has the whole isolation. For most jobs it needs nothing of the request, so a spare applies
it in advance; for other jobs it takes their order. `finish` has the steps that depend on the
request, and ends with `Execute`.

The order of the steps is what makes a start safe:

1. The process enters the scope first, so it never runs outside the job's limits.
2. It assembles the root with the launcher's rights, and pivots into it.
3. It enters the user namespace near the end. From then on it has no right over the host, and cannot
   change its mounts, which belong to an outer user namespace.
4. It drops capabilities after that, because entering the user namespace grants a full set.
5. It closes descriptors after that, because entering the user namespace needs one.
6. It installs the system-call filter then, because the steps before make calls that no job may
   make. The calls that follow (for waiting, chdir(2), execve(2)) every job may make.
7. It executes the trampoline last (`sandbox.start.trampoline`), which waits for the request.

Standard library only: the launcher makes the plan, from its own policy. The service asks for a job,
never for steps.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jobworker.sandbox.capabilities import Capability
from jobworker.sandbox.start import steps as s

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WORKSPACE = "/workspace"
FIRST_VOLUME_DESCRIPTOR = 64
DISK = "/disk"
"""The mount point of a job's disk in the launcher's namespace, which the job cannot see."""

ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
}
"""The variables of every job. It gets none of the service's or the launcher's own environment."""

WRITABLE_DIRECTORIES = {
    "tmp": "/tmp",  # noqa: S108
    "vartmp": "/var/tmp",  # noqa: S108
    "home": "/root",
    "workspace": WORKSPACE,
}
"""The writable directories of a read-only root: the name on disk, and the path in the root."""

DEVICES = (
    *(("null", 1, 3), ("zero", 1, 5), ("full", 1, 7)),
    *(("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)),
)
"""Character devices that every job has: name, major and minor number, see null(4) and others."""
DEVICE_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)

MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/buddyinfo",
    "/proc/bus",
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/consoles",
    "/proc/diskstats",
    "/proc/dma",
    "/proc/fs",
    "/proc/interrupts",
    "/proc/iomem",
    "/proc/ioports",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/key-users",
    "/proc/kmsg",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/locks",
    "/proc/mdstat",
    "/proc/mtrr",
    "/proc/pagetypeinfo",
    "/proc/partitions",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/swaps",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
)
READ_ONLY = ("/proc/irq", "/proc/pressure", "/proc/sys")

KEPT_CAPABILITIES = frozenset(
    {
        Capability.CHOWN,
        Capability.DAC_OVERRIDE,
        Capability.FOWNER,
        Capability.FSETID,
        Capability.KILL,
        Capability.SETGID,
        Capability.SETUID,
        Capability.SETPCAP,
        Capability.NET_BIND_SERVICE,
        Capability.SYS_CHROOT,
        Capability.AUDIT_WRITE,
        Capability.SETFCAP,
    }
)
"""The capabilities of a job's root, which hold in the job's own user namespace only. It is the set
that containers commonly get, without NET_RAW and MKNOD."""

RESOURCE_LIMITS = (
    s.SetResourceLimit("RLIMIT_CORE", 0, 0),
    # When the first process is reaped, the kernel drops its entries of /proc/1/fd. So this is one
    # bound on how long that takes: see `sandbox.reaper`.
    s.SetResourceLimit("RLIMIT_NOFILE", 1024, 65_536),
    s.SetResourceLimit("RLIMIT_MEMLOCK", 8 << 20, 8 << 20),
    s.SetResourceLimit("RLIMIT_MSGQUEUE", 819_200, 819_200),
    s.SetResourceLimit("RLIMIT_NICE", 0, 0),
    s.SetResourceLimit("RLIMIT_RTPRIO", 0, 0),
)


_TTY_GROUP = 5


class Layer(NamedTuple):
    """One overlay of a job's root."""

    at: str
    """The path in the root at which it is mounted, "" for the root itself."""
    lower: tuple[str, ...]
    """The read-only directories that it shows, the uppermost first."""


class RootView(NamedTuple):
    """The parts of a job's root, by their paths in the launcher's mount namespace.

    A view without layers is a complete root, read-only and one for all jobs.
    """

    null: str
    """The path of a /dev/null."""
    mapped: tuple[str, ...] = ()
    """Mounts that the job sees with the ids of its range."""
    layers: tuple[Layer, ...] = ()
    """The overlays in the order in which they are mounted."""
    scratch: str = ""
    """The directory in which a job's writable directories are made, if the root is read-only."""
    volumes: tuple[tuple[str, str, str], ...] = ()
    """The volumes: name, path of the image, path in the root."""


class Sizes(NamedTuple):
    """Bounds on what a job may store, in bytes, and on its terminals."""

    disk: int
    """The size of its disk, if its root has layers."""
    tmpfs: int
    """The size of each of its memory file systems. The job's memory limit counts them as well."""
    terminals: int
    """How many pseudo-terminals it may have open."""


class Slot(NamedTuple):
    """The name and the range of user ids that one live job has to itself."""

    name: str
    first_uid: int
    ids: int = 65_536
    """How many ids from `first_uid` on are its own."""


class Order(NamedTuple):
    """The part of a request that the start of a job needs."""

    hostname: str
    """The launcher sets it: a child that has applied `prepare` has no right to."""
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    workdir: str
    network: str = "host"
    """"host", "none" or "private"."""
    uid: int = 0
    gid: int = 0
    disk_bytes: int = 0
    """The size of its disk; 0 is the usual one."""
    runtime: str = ""
    """The name of a runtime; "" is the host's programs."""
    volumes: tuple[tuple[str, str], ...] = ()
    """The volumes: name, and path in the root."""
    init: bool = False
    """Whether the init is PID 1 in front of the program."""


class OwnNetwork(NamedTuple):
    """A network namespace of the job's own, and the texts for its /etc/hosts and resolv.conf."""

    hostname: str
    address: str = "127.0.0.1"
    resolv_conf: str = ""
    has_gateway: bool = False


def prepare(
    root: str,
    view: RootView,
    slot: Slot,
    sizes: Sizes,
    order: Order | None = None,
    own_network: OwnNetwork | None = None,
) -> tuple[s.Step, ...]:
    """The steps before the request: assemble the root at `root`, enter it, give up all rights.

    `order` is None for a spare; otherwise the child is made for this order. `own_network` is None
    for the host's network.
    """
    owner = slot.first_uid
    return (
        s.AttachScope(),
        # Before the Landlock domain, in which the process cannot reach its gateway.
        *_network(own_network, slot),
        s.ScopeSocketsAndSignals(),
        s.KeepOwnDescriptors(view.null),
        s.UnshareCgroupNamespace(),
        s.NewSession(),
        s.NewKeyring(),
        *(_layers(root, view, sizes.disk, owner) if view.layers else _scratch(root, view, slot)),
        s.MountTmpfs(f"{root}/run", 0o755, sizes.tmpfs, owner),
        s.MountTmpfs(f"{root}/dev/shm", 0o1777, sizes.tmpfs, owner),  # noqa: S108
        s.MountDevpts(f"{root}/dev/pts", owner + min(_TTY_GROUP, slot.ids - 1), sizes.terminals),
        s.MountProc(f"{root}/proc"),
        *(s.MaskPath(root + path) for path in MASKED),
        *(s.ReadOnlyPath(root + path) for path in READ_ONLY),
        s.PivotRoot(root),
        *_places(view, owner),
        *_names(own_network),
        *RESOURCE_LIMITS,
        s.SetOomScore(0),
        s.EnterUserNamespace(leave_groups=slot.ids > 1),
        s.DropCapabilities(KEPT_CAPABILITIES),
        s.ForbidNewPrivileges(),
        *_user(order),
        s.DieWithLauncher(),
        s.ResetSignals(),
        s.CloseDescriptors(),
        s.FilterSystemCalls(),
        s.BecomeInit() if order is not None and order.init else s.BecomeTrampoline(),
    )


def _layers(root: str, view: RootView, disk_bytes: int, owner: int) -> tuple[s.Step, ...]:
    """The steps for a root that the job can change, with a disk of its own."""
    return (
        *(s.MapIds(mount) for mount in view.mapped),
        s.MountDisk(DISK, disk_bytes),
        *(
            s.MountOverlay(root + layer.at, layer.lower, f"{DISK}/{number}", owner)
            for number, layer in enumerate(view.layers)
        ),
        s.MountDevices(f"{root}/dev", owner, DEVICES, DEVICE_LINKS, ("pts", "shm")),
        *(
            s.OpenVolume(name, image, f"{DISK}/volume", FIRST_VOLUME_DESCRIPTOR + number)
            for number, (name, image, _) in enumerate(view.volumes)
        ),
    )


def _places(view: RootView, owner: int) -> tuple[s.Step, ...]:
    """The steps that mount volumes. They follow PivotRoot, so no path leads out of the root."""
    return tuple(
        s.PlaceVolume(place, FIRST_VOLUME_DESCRIPTOR + number, owner)
        for number, (_, _, place) in enumerate(view.volumes)
    )


def _scratch(root: str, view: RootView, slot: Slot) -> tuple[s.Step, ...]:
    """The steps for a read-only root with some writable directories."""
    own = f"{view.scratch}/{slot.name}"
    return (
        s.MakeScratch(own, tuple(WRITABLE_DIRECTORIES), slot.first_uid),
        *(s.BindScratch(f"{own}/{name}", root + at) for name, at in WRITABLE_DIRECTORIES.items()),
    )


def finish(order: Order) -> tuple[s.ChangeDirectory, s.Execute]:
    """The steps after the request, which the trampoline carries out."""
    return (
        s.ChangeDirectory(order.workdir or WORKSPACE),
        s.Execute(order.arguments, tuple(_environment(order).items())),
    )


def _network(own: OwnNetwork | None, slot: Slot) -> tuple[s.Step, ...]:
    if own is None:
        return ()
    step = s.EnterNetwork if own.has_gateway else s.UnshareNetwork
    return (step(slot.first_uid, slot.ids),)


def _names(own: OwnNetwork | None) -> tuple[s.Step, ...]:
    """The step that replaces the host's /etc/hosts and resolv.conf, for a network of its own."""
    if own is None:
        return ()
    local = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
    hosts = f"{local}{own.address} {own.hostname}\n"
    return (s.WriteNames((("/etc/hosts", hosts), ("/etc/resolv.conf", own.resolv_conf))),)


def fits_spare(order: Order, usual_disk_bytes: int) -> bool:
    """Whether a spare fits this order: it is root on the host's network, with the usual disk."""
    usual_root = not (order.runtime or order.volumes) and order.disk_bytes in (0, usual_disk_bytes)
    usual_process = not (order.uid or order.gid or order.init)
    return usual_root and usual_process and order.network == "host"


def _user(order: Order | None) -> tuple[s.Step, ...]:
    if order is None or not (order.uid or order.gid):
        return ()
    directories = (WORKSPACE, WRITABLE_DIRECTORIES["home"]) if order.uid else ()
    return (s.SetUser(order.uid, order.gid, directories),)


def _environment(order: Order) -> Mapping[str, str]:
    """The job's variables. Another user than root has the workspace as HOME, and no user name."""
    found = dict(ENVIRONMENT)
    if order.uid:
        found["HOME"] = WORKSPACE
        del found["USER"], found["LOGNAME"]
    return {**found, **order.environment}
