"""The steps by which a process becomes a job: frozen data, no effect.

A step says what is to hold, `sandbox.start.apply` makes it so, `sandbox.start.plan` puts steps in
order. `name_of` is the word by which a failed step is reported and by which the documents speak of
it. Standard library only: the launcher carries them.
"""

import re
from typing import NamedTuple

ROOT = "/root"
"""Where the launcher's mount namespace has a job's root, until the job's process pivots to it."""


class AttachScope(NamedTuple):
    """Enter the job's control groups, so that all that follows is inside its limits."""


class ScopeSocketsAndSignals(NamedTuple):
    """Enter a Landlock domain of the job's own, where the kernel can scope: landlock(7)."""


class KeepOwnDescriptors(NamedTuple):
    """Put the job's standard streams in their places and close all that belongs to others."""

    stdin: str


class UnshareCgroupNamespace(NamedTuple):
    """Make the job's own control group the root that it sees: cgroup_namespaces(7)."""


class NewSession(NamedTuple):
    """Leave the launcher's session and any controlling terminal: setsid(2)."""


class NewKeyring(NamedTuple):
    """Leave the launcher's session keyring: session-keyring(7)."""


class MountTmpfs(NamedTuple):
    """Mount an empty tmpfs that belongs to the job's root user: tmpfs(5)."""

    path: str
    mode: int
    size_bytes: int
    owner: int


class MakeScratch(NamedTuple):
    """Make the job's directories on disk, empty and its own, where its root is read-only."""

    directory: str
    names: tuple[str, ...]
    owner: int


class BindScratch(NamedTuple):
    """Put one of the job's directories on disk in its place in the root."""

    source: str
    path: str


class MapIds(NamedTuple):
    """Show the mount at a path with the ids of the job's range: mount_setattr(2)."""

    path: str


class MountDisk(NamedTuple):
    """Mount a new disk of the job's own, which goes with it: loop(4), ext4(5)."""

    path: str
    size_bytes: int


class MountOverlay(NamedTuple):
    """Show read-only directories with what the job changes laid over them: overlayfs.rst."""

    path: str
    lower: tuple[str, ...]
    disk: str
    """A directory, not there yet, for what the job changes."""
    owner: int


class OpenVolume(NamedTuple):
    """Mount a volume with the ids of the job's range, nowhere yet: at a descriptor."""

    name: str
    image: str
    """Its path in the launcher's namespace."""
    stage: str
    """A directory, not there yet, to mount upon for a moment."""
    descriptor: int


class PlaceVolume(NamedTuple):
    """Put an opened volume into its place in the root, on no way through a link."""

    path: str
    descriptor: int
    owner: int


class MountDevices(NamedTuple):
    """Mount a /dev of the job's own with the devices that everybody may use: null(4)."""

    path: str
    owner: int
    devices: tuple[tuple[str, int, int], ...]
    links: tuple[tuple[str, str], ...]
    directories: tuple[str, ...]


class MountDevpts(NamedTuple):
    """Mount terminals of the job's own: a new devpts instance.

    The kernel counts terminals for the whole host, so an instance has a bound: open(2) of
    /dev/ptmx answers ENOSPC beyond.
    """

    path: str
    tty_group: int
    most: int


class MountProc(NamedTuple):
    """Mount a fresh /proc that shows the job's process namespace alone: proc(5)."""

    path: str


class MaskPath(NamedTuple):
    """Hide a file behind /dev/null or a directory behind an empty one, where it exists."""

    path: str


class ReadOnlyPath(NamedTuple):
    """Make what stands at a path read-only, where it exists."""

    path: str


class PivotRoot(NamedTuple):
    """Make the assembled tree the root and let go of the old one: pivot_root(2)."""

    path: str


class UnshareNetwork(NamedTuple):
    """Leave the host's network for one with nothing but a loopback: network_namespaces(7)."""

    first_gid: int
    """The job's first group, as the launcher numbers it, which may ping there as the rest may."""
    ids: int


class EnterNetwork(NamedTuple):
    """Enter the network that a gateway has made, once it is up."""

    first_gid: int
    """See `UnshareNetwork`."""
    ids: int


class WriteNames(NamedTuple):
    """Put files of the job's own, by path, in the place of the host's, where those exist."""

    files: tuple[tuple[str, str], ...]


class SetResourceLimit(NamedTuple):
    """Set a resource limit, soft and hard: setrlimit(2)."""

    resource: str
    soft: int
    hard: int


class SetOomScore(NamedTuple):
    """How soon, at least, the kernel picks the job when the host has no memory left: proc(5)."""

    value: int


class EnterUserNamespace(NamedTuple):
    """Enter the user namespace that maps root inside to an unprivileged id outside."""

    leave_groups: bool
    """Not where the launcher's user has a single id: the kernel lets nobody leave groups there."""


class DropCapabilities(NamedTuple):
    """Keep these capabilities over the job's own user namespace, drop all others for good."""

    keep: frozenset[int]


class SetUser(NamedTuple):
    """Become an ordinary user of the job's own, who then owns these of its directories."""

    uid: int
    gid: int
    directories: tuple[str, ...]


class ForbidNewPrivileges(NamedTuple):
    """No setuid program and no file capability gives anything any more: no_new_privs."""


class DieWithLauncher(NamedTuple):
    """Have the kernel kill the job should the launcher be killed: PR_SET_PDEATHSIG."""


class ResetSignals(NamedTuple):
    """Give every signal its default disposition and unblock all: signal(7)."""


class CloseDescriptors(NamedTuple):
    """Close every descriptor above standard error, but those that the trampoline needs."""


class BecomeInit(NamedTuple):
    """Execute the init, whose child becomes the trampoline: see `sandbox.start.init_program`."""


class BecomeTrampoline(NamedTuple):
    """Become the small program that waits for the order: `sandbox.start.trampoline`."""


class ChangeDirectory(NamedTuple):
    """Go to the job's working directory, inside its root."""

    path: str


class FilterSystemCalls(NamedTuple):
    """Load the system-call filter, under which the wait for an order runs already: seccomp(2)."""


class Execute(NamedTuple):
    """Become the job's program: execve(2)."""

    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


Step = (
    AttachScope
    | ScopeSocketsAndSignals
    | KeepOwnDescriptors
    | UnshareCgroupNamespace
    | NewSession
    | NewKeyring
    | MountTmpfs
    | MakeScratch
    | BindScratch
    | MapIds
    | MountDisk
    | MountOverlay
    | MountDevices
    | OpenVolume
    | PlaceVolume
    | MountDevpts
    | MountProc
    | MaskPath
    | ReadOnlyPath
    | PivotRoot
    | UnshareNetwork
    | EnterNetwork
    | WriteNames
    | SetResourceLimit
    | SetOomScore
    | EnterUserNamespace
    | DropCapabilities
    | SetUser
    | ForbidNewPrivileges
    | DieWithLauncher
    | ResetSignals
    | CloseDescriptors
    | BecomeInit
    | BecomeTrampoline
    | ChangeDirectory
    | FilterSystemCalls
    | Execute
)


def explain(step: Step) -> tuple[str, str, str]:
    """A step for people: its name, what it is about where that is a text, and what it does."""
    subject = next((value for value in step if isinstance(value, str)), "")
    what = (type(step).__doc__ or "").partition("\n")[0]
    return name_of(step), subject, what


def name_of(step: Step | type[Step]) -> str:
    """The step's name in words: `EnterUserNamespace` is "enter-user-namespace"."""
    kind = step if isinstance(step, type) else type(step)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()
