"""The steps by which a process becomes a job: frozen data without behaviour.

A step describes one change, `sandbox.start.apply` makes it, and `sandbox.start.plan` puts steps in
order. `name_of` gives the name of a step in error messages and documents. The first line of each
docstring is what `worker-cli run --dry-run` prints for the step.

Standard library only: the launcher uses them.
"""

import re
from typing import NamedTuple

ROOT = "/root"
"""The path of a job's root in the launcher's mount namespace, until the job's process enters it."""


class AttachScope(NamedTuple):
    """Enter the job's control groups, so that its limits hold for all that follows."""


class ScopeSocketsAndSignals(NamedTuple):
    """Enter a Landlock domain of the job's own, where the kernel can scope: landlock(7)."""


class KeepOwnDescriptors(NamedTuple):
    """Set up the job's standard streams, and close all descriptors that are not the job's."""

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
    """Make the job's own empty directories on disk, for a root that is read-only."""

    directory: str
    names: tuple[str, ...]
    owner: int


class BindScratch(NamedTuple):
    """Mount one of the job's directories on disk in its root."""

    source: str
    path: str


class MapIds(NamedTuple):
    """Show the mount at a path with the ids of the job's range: mount_setattr(2)."""

    path: str


class MountDisk(NamedTuple):
    """Mount a new disk, which is discarded with the job: loop(4), ext4(5)."""

    path: str
    size_bytes: int


class MountOverlay(NamedTuple):
    """Mount an overlay of read-only directories that takes the job's changes: overlayfs.rst."""

    path: str
    lower: tuple[str, ...]
    disk: str
    """A directory for the job's changes, which the step makes."""
    owner: int


class OpenVolume(NamedTuple):
    """Open a volume as a detached mount with the ids of the job's range: open_tree(2)."""

    name: str
    image: str
    """The path of its image in the launcher's namespace."""
    mount_point: str
    """A mount point for a moment, which the step makes and removes."""
    descriptor: int
    """The number of the descriptor that the detached mount gets."""


class PlaceVolume(NamedTuple):
    """Mount an opened volume in the job's root, at a path that leads through no link."""

    path: str
    descriptor: int
    owner: int


class MountDevices(NamedTuple):
    """Mount the job's own /dev, with the devices that every user may use: null(4)."""

    path: str
    owner: int
    devices: tuple[tuple[str, int, int], ...]
    links: tuple[tuple[str, str], ...]
    directories: tuple[str, ...]


class MountDevpts(NamedTuple):
    """Mount a devpts instance of the job's own, for its terminals: pts(4).

    The kernel bounds the number of terminals of the whole host, so each instance has a bound of its
    own. Beyond it open(2) of /dev/ptmx fails with ENOSPC.
    """

    path: str
    tty_group: int
    most: int
    """How many terminals the instance may have."""


class MountProc(NamedTuple):
    """Mount a new /proc that shows only the job's process namespace: proc(5)."""

    path: str


class MaskPath(NamedTuple):
    """Cover a file with /dev/null or a directory with an empty one, where it exists."""

    path: str


class ReadOnlyPath(NamedTuple):
    """Make a path read-only, where it exists."""

    path: str


class PivotRoot(NamedTuple):
    """Make the assembled tree the root and unmount the old one: pivot_root(2)."""

    path: str


class UnshareNetwork(NamedTuple):
    """Leave the host's network for one with only a loopback: network_namespaces(7)."""

    first_gid: int
    """The id of the job's first group in the launcher's user namespace. Its groups may ping."""
    ids: int
    """How many groups the job has from `first_gid` on."""


class EnterNetwork(NamedTuple):
    """Enter the network that the job's gateway has made, once it is up."""

    first_gid: int
    """See `UnshareNetwork`."""
    ids: int


class WriteNames(NamedTuple):
    """Replace the host's files of names and addresses by the job's own, where they exist."""

    files: tuple[tuple[str, str], ...]
    """Each file's path and text."""


class SetResourceLimit(NamedTuple):
    """Set a resource limit, soft and hard: setrlimit(2)."""

    resource: str
    soft: int
    hard: int


class SetOomScore(NamedTuple):
    """Raise the job's OOM score to this value, if it is lower: proc_pid_oom_score_adj(5)."""

    value: int


class EnterUserNamespace(NamedTuple):
    """Enter the user namespace that maps root inside to an unprivileged id outside."""

    leave_groups: bool
    """Whether to drop supplementary groups. With a single mapped id the kernel forbids it."""


class DropCapabilities(NamedTuple):
    """Keep these capabilities over the job's own user namespace, drop all others for good."""

    keep: frozenset[int]


class SetUser(NamedTuple):
    """Become an ordinary user of the job, who then owns these of its directories."""

    uid: int
    gid: int
    directories: tuple[str, ...]


class ForbidNewPrivileges(NamedTuple):
    """Set no_new_privs: setuid programs and file capabilities give no rights any more."""


class DieWithLauncher(NamedTuple):
    """Have the kernel kill the job if the launcher dies: PR_SET_PDEATHSIG."""


class ResetSignals(NamedTuple):
    """Give every signal its default disposition and unblock all: signal(7)."""


class CloseDescriptors(NamedTuple):
    """Close every descriptor above standard error, except those that the trampoline needs."""


class BecomeInit(NamedTuple):
    """Execute the init, whose child becomes the trampoline: see `sandbox.start.init_program`."""


class BecomeTrampoline(NamedTuple):
    """Become the small program that waits for the order: `sandbox.start.trampoline`."""


class ChangeDirectory(NamedTuple):
    """Change to the job's working directory, inside its root."""

    path: str


class FilterSystemCalls(NamedTuple):
    """Install the system-call filter, under which the process waits for its order: seccomp(2)."""


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
    """A step for people: its name, its first field that is a text (or ""), and what it does."""
    subject = next((value for value in step if isinstance(value, str)), "")
    what = (type(step).__doc__ or "").partition("\n")[0]
    return name_of(step), subject, what


def name_of(step: Step | type[Step]) -> str:
    """The step's name with hyphens: `EnterUserNamespace` is "enter-user-namespace"."""
    kind = step if isinstance(step, type) else type(step)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()
