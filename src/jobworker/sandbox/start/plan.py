"""From what a job asks for and what the launcher allows to an ordered tuple of steps.

Pure: no clock, no I/O, no privilege; the same input gives the same steps. There are two
halves. `prepare` holds what every job needs alike, so that a spare child can have it done
before anybody asks: all of the isolation. `finish` holds what only the request tells, and ends
with `Execute`.

The order is what makes the whole safe, and holds for both halves together:

1. the scope first, so that nothing of the job ever runs outside its limits;
2. the root is assembled with the launcher's rights and pivoted into;
3. the user namespace last but a few: from then on the process has no right over the host, and
   its mounts, which an outer namespace owns, cannot be changed from inside;
4. capabilities after the user namespace, whose entry hands out a full set;
5. descriptors after that, since entering the user namespace needs one;
6. the system-call filter then: setting up a job takes calls that no job may make, and what is
   left to do, waiting, chdir(2) and execve(2), every job may;
7. the trampoline last of what is prepared (`sandbox.start.trampoline`): it waits for the request.

Standard library only: the launcher itself builds the plan, from its own policy. The service
asks for a job, never for steps.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jobworker.sandbox.capabilities import Capability
from jobworker.sandbox.start import steps as s

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WORKSPACE = "/workspace"
FIRST_VOLUME_DESCRIPTOR = 64
DISK = "/disk"
"""Where a job's own disk is mounted in the launcher's namespace: out of the job's sight."""

ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
}
"""What every job finds; nothing of the service's or the launcher's own environment."""

SCRATCH = {"tmp": "/tmp", "vartmp": "/var/tmp", "home": "/root", "workspace": WORKSPACE}  # noqa: S108
"""What is writable of a read-only root: directories on disk, by their place."""

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
"""What a job's root has, over the job's own user namespace only. It is the set that containers
commonly get, less NET_RAW and MKNOD."""

RESOURCE_LIMITS = (
    s.SetResourceLimit("RLIMIT_CORE", 0, 0),
    # The launcher has to forget what /proc showed of the first process's: see
    # `sandbox.launcher.zombies`.
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
    """Its place in the root, "" for the root itself; in the order of mounting."""
    lower: tuple[str, ...]
    """The read-only directories that it shows, the uppermost first."""


class View(NamedTuple):
    """What jobs' roots are made of, as it stands in the launcher's mount namespace.

    Without layers it is a whole root, read-only and the same for all.
    """

    null: str
    """A /dev/null."""
    mapped: tuple[str, ...] = ()
    """Mounts whose ids are to be those of the job's range."""
    layers: tuple[Layer, ...] = ()
    scratch: str = ""
    """Where the directories of a read-only root are made."""
    volumes: tuple[tuple[str, str, str], ...] = ()
    """Volumes: the name, the path of the image, the place in the root."""


class Sizes(NamedTuple):
    """Bounds on what a job may store, in bytes, and on its terminals."""

    disk: int
    """All that it writes below its root, if that has layers."""
    tmpfs: int
    """Each of the memory file systems, which the job's memory limit also counts."""
    terminals: int
    """How many pseudo-terminals."""


class Slot(NamedTuple):
    """What one live job alone has: its range of ids."""

    name: str
    first_uid: int
    ids: int = 65_536
    """How many ids from `first_uid` on are its own."""


class Order(NamedTuple):
    """What the request tells about the job to start."""

    hostname: str
    """Set by the launcher, from outside: the job may not, and its child is a job's already."""
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    workdir: str
    network: str = "host"
    """One of its own, and another user than root, stand in the way of a spare (`fits_spare`)."""
    uid: int = 0
    gid: int = 0
    disk_bytes: int = 0
    """The size of its disk; 0 is the usual one."""
    runtime: str = ""
    """The name of a root tree; "" is the host's programs."""
    volumes: tuple[tuple[str, str], ...] = ()
    """Names of volumes, each with its place in the root."""
    init: bool = False
    """Whether an init is to be PID 1 in front of the program."""


class OwnNetwork(NamedTuple):
    """A network that is not the host's, and the names in it."""

    hostname: str
    address: str = "127.0.0.1"
    resolv_conf: str = ""
    has_gateway: bool = False


def prepare(
    root: str,
    view: View,
    slot: Slot,
    sizes: Sizes,
    order: Order | None = None,
    own_network: OwnNetwork | None = None,
) -> tuple[s.Step, ...]:
    """The steps before the request: the root at `root`, pivoted into, and all rights given up.

    `order` is given where the child is made for it and not kept as a spare, and `own_network` where
    that asks for one.
    """
    owner = slot.first_uid
    return (
        s.AttachScope(),
        *_network(
            own_network, slot
        ),  # before the domain, which would keep it away from its gateway
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


def _layers(root: str, view: View, disk_bytes: int, owner: int) -> tuple[s.Step, ...]:
    """A root of the job's own to change."""
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


def _places(view: View, owner: int) -> tuple[s.Step, ...]:
    """Volumes are placed where no path leads out of the job's root any more."""
    return tuple(
        s.PlaceVolume(place, FIRST_VOLUME_DESCRIPTOR + number, owner)
        for number, (_, _, place) in enumerate(view.volumes)
    )


def _scratch(root: str, view: View, slot: Slot) -> tuple[s.Step, ...]:
    """A read-only root with some directories to write to."""
    own = f"{view.scratch}/{slot.name}"
    return (
        s.MakeScratch(own, tuple(SCRATCH), slot.first_uid),
        *(s.BindScratch(f"{own}/{name}", root + at) for name, at in SCRATCH.items()),
    )


def finish(order: Order) -> tuple[s.ChangeDirectory, s.Execute]:
    """The steps after the request: they are the trampoline's."""
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
    """What a network of the job's own needs in place of the host's files."""
    if own is None:
        return ()
    local = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
    hosts = f"{local}{own.address} {own.hostname}\n"
    return (s.WriteNames((("/etc/hosts", hosts), ("/etc/resolv.conf", own.resolv_conf))),)


def fits_spare(order: Order, usual_disk_bytes: int) -> bool:
    """Whether what was prepared for nobody in particular is right for this order."""
    usual_root = not (order.runtime or order.volumes) and order.disk_bytes in (0, usual_disk_bytes)
    usual_process = not (order.uid or order.gid or order.init)
    return usual_root and usual_process and order.network == "host"


def _user(order: Order | None) -> tuple[s.Step, ...]:
    if order is None or not (order.uid or order.gid):
        return ()
    directories = (WORKSPACE, SCRATCH["home"]) if order.uid else ()
    return (s.SetUser(order.uid, order.gid, directories),)


def _environment(order: Order) -> Mapping[str, str]:
    """Root's variables name root; another user's home is the workspace."""
    found = dict(ENVIRONMENT)
    if order.uid:
        found["HOME"] = WORKSPACE
        del found["USER"], found["LOGNAME"]
    return {**found, **order.environment}
