"""Volumes: disks in files that outlive jobs, each with its name and size.

An image stands in the service's state directory. The process that becomes a job attaches it to a
loop device, or finds the one that it is attached to already, since two devices before one file
would ruin it (`disk.images.mount_volume`); the device goes with the last mount. Every job that has
a volume mounts the same file system, with the ids of its own range.

A volume is reserved: its image takes its size when it is made, so what is written to the volume is
on the disk below, however full that is. A thin one takes what is written to it.

An image gets its name when it is complete, so that nothing half-made is ever found.

What must hold: the launcher's thread does nothing on the file system where images stand, which jobs
fill and keep busy. It knows which volumes live jobs have; processes of their own (`sandbox.chores`)
make, remove and list.

Standard library only. Raises SandboxError with the step "volume", the errno and the name.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from jobworker.errors import SandboxError
from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import Chores, Done
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.disk.images import Workshop
from jobworker.sandbox.log import say
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES, name_fault

_SUFFIX = ".img"
_MAX_TOLD = 32
"""Strange files that one reply names, which has a bound in bytes."""


class Volumes:
    """All volumes of the service."""

    def __init__(self, workshop: Workshop | None, room: int) -> None:
        self._room = room
        """How many live jobs may have together: each takes a descriptor."""
        self._workshop = workshop
        """Where images stand; None where there can be none."""
        self._users: Counter[str] = Counter()
        self._going: set[str] = set()
        """Those that are being removed."""
        self._told: set[str] = set()
        """Files among the images that are none, of which the log has told."""

    def take(self, names: Sequence[str]) -> list[str]:
        """The paths of the images of volumes that a job is about to have; `give_back` them."""
        paths = [self.path(name) for name in names]
        for name in names:
            if name in self._going:
                raise refusal(errno.ENOENT, name)
        if self._users.total() + len(names) > self._room:
            raise refusal(errno.EMFILE, names[0])
        self._users.update(names)
        return paths

    def give_back(self, names: Iterable[str]) -> None:
        """A job that had these has ended."""
        self._users.subtract(names)

    def path(self, name: str) -> str:
        """The path of a volume's image, which need not be there."""
        if self._workshop is None:
            raise refusal(errno.EPERM, name)
        return f"{self._workshop.directory}/{name}{_SUFFIX}"

    def list(self, chores: Chores, done: Done) -> None:
        """Tell of all volumes: sizes in bytes, and how many live jobs have them."""
        if self._workshop is None:
            done({"volumes": []})
            return

        def add_users(outcome: Message) -> None:
            volumes = outcome.get("volumes", [])
            assert isinstance(volumes, list)
            for volume in volumes:
                volume["jobs"] = self._users[volume["name"]]
            self._tell(outcome.pop("strange", []))
            done(outcome)

        _start(chores, partial(_list, self._workshop.directory), add_users, "")

    def _tell(self, strange: object) -> None:
        """Tell once of each file that stands among the images and is no volume."""
        assert isinstance(strange, list)
        self._told &= {name for name, _ in strange}  # one that comes again is told again
        for name, why in strange:
            if name not in self._told:
                self._told.add(name)
                say(f"{name} among the volumes is none and is passed over: {why}")

    def remove(self, chores: Chores, name: str, done: Done) -> None:
        """Remove a volume that no live job has, with all that is on it."""
        path = self.path(name)
        if name in self._going:
            raise refusal(errno.ENOENT, name)
        if self._users[name] > 0:
            raise refusal(errno.EBUSY, name)

        def removed(outcome: Message) -> None:
            self._going.discard(name)
            done(outcome)

        _start(chores, partial(_remove, path), removed, name)
        self._going.add(name)

    def make(self, chores: Chores, name: str, size: int, done: Done, *, thin: bool) -> None:
        """Make a volume."""
        path = self.path(name)
        assert self._workshop is not None
        _start(
            chores,
            partial(_make, self._workshop._replace(reserve=not thin), path, size),
            done,
            name,
        )


def _start(chores: Chores, work: partial[Message], done: Done, name: str) -> None:
    """Start a chore whose failure is told as that of a volume; "" is all of them."""

    def told(outcome: Message) -> None:
        if "errno" in outcome:
            outcome = {**outcome, "step": "volume", "detail": name, "why": outcome.get("detail")}
        done(outcome)

    try:
        chores.start(work, told)
    except OSError as error:
        raise refusal(error.errno or errno.EIO, name) from error


def refusal(code: int, name: str) -> SandboxError:
    """The error that the service explains as one of a volume."""
    return SandboxError(
        f"cannot use the volume {name}: {os.strerror(code)}",
        data={"step": "volume", "errno": code, "detail": name},
    )


# --- in a process of its own --------------------------------------------------------------------


def _list(directory: str) -> Message:
    """All volumes, and some of the files that stand among them and are none.

    Others than the launcher may have put files there: a backup that broke off, a new disk's
    lost+found. One of them must not keep the rest from being listed.
    """
    found: list[dict[str, object]] = []
    strange: list[tuple[str, str]] = []
    for file in sorted(os.listdir(directory)):
        name = file.removesuffix(_SUFFIX)
        if name == file:
            continue
        listed = "its name is none" if name_fault(name) else _look_at(directory, name)
        if isinstance(listed, str):
            strange.append((ascii(file), listed))
        elif listed is not None:
            found.append(listed)
    return {"volumes": found, "strange": strange[:_MAX_TOLD]}


def _look_at(directory: str, name: str) -> dict[str, object] | str | None:
    """What is to be told of a volume, or why it is none; None where it was just removed."""
    path = f"{directory}/{name}{_SUFFIX}"
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):  # opening it may wait, or do something
            return "it is no regular file"
        if not MIN_DISK_BYTES <= status.st_size <= MAX_DISK_BYTES:
            return f"it has {status.st_size} bytes, which no volume has"
        image = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            thin = not disk_images.is_reserved(image)
        finally:
            os.close(image)
    except FileNotFoundError:
        return None
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    sizes = {"size_bytes": status.st_size, "used_bytes": status.st_blocks * 512}
    return {"name": name, **sizes, "thin": thin}


def _remove(path: str) -> Message:
    os.unlink(path)
    return {}


def _make(workshop: Workshop, path: str, size: int) -> Message:
    """Make an image and give it its name."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    label = disk_images.RESERVED_LABEL if workshop.reserve else ""
    image = disk_images.create(workshop._replace(label=label), size, journal=True)
    if workshop.reserve:
        disk_images.mark_reserved(image)
    os.fsync(image)
    directory = os.open(workshop.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # With a descriptor linkat(2) is called, which can follow the link to a file without name.
    os.link(f"/proc/self/fd/{image}", path, src_dir_fd=directory, follow_symlinks=True)
    os.fsync(directory)
    return {}
