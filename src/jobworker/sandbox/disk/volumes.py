"""Makes, lists and removes volumes: disks in files that outlive jobs, each with a name and a size.

The image of a volume is a file in the service's state directory. The process that becomes a job
attaches it to a loop device, or uses the device that it is attached to already: two devices in
front of one file would corrupt it (`disk.images.mount_volume`). The kernel frees the device with
the last mount. Every job that uses a volume mounts the same file system, with the ids of its own
range.

A volume is reserved unless it is thin. A reserved image allocates its whole size when it is made,
so writes to the volume succeed even if the disk below is full. A thin one allocates blocks as they
are written.

An image gets its name only when it is complete, so nobody finds a half-made volume.

What must hold: the launcher's thread does no I/O on the file system of the images, which jobs fill
and keep busy. It only counts the volumes of live jobs. Processes of their own (`sandbox.chores`)
make, remove and list volumes.

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
from jobworker.sandbox.disk.images import ImageSettings
from jobworker.sandbox.log import log_line
from jobworker.storage import MAX_DISK_BYTES, MIN_DISK_BYTES, name_fault

_SUFFIX = ".img"
_MAX_STRANGE = 32
"""How many strange files one reply names, since a reply has a bound in bytes."""


class VolumeStore:
    """All volumes of the service, and how many live jobs use each."""

    def __init__(self, image_settings: ImageSettings | None, room: int) -> None:
        self._room = room
        """How many volumes all live jobs may use together: each use takes a descriptor."""
        self._image_settings = image_settings
        """The settings for making images; None where the launcher cannot have volumes."""
        self._users: Counter[str] = Counter()
        """How many live jobs use a volume, by its name."""
        self._removing: set[str] = set()
        """Names of volumes that a process is removing."""
        self._logged: set[str] = set()
        """Files in the directory that are no volumes, and that the log names already."""

    def acquire(self, names: Sequence[str]) -> list[str]:
        """The paths of the images of `names`, which now count as used by one more live job.

        The caller returns them by `release`. Raises SandboxError: ENOENT for a volume that is
        being removed, EMFILE if live jobs use as many as they may.
        """
        paths = [self.path(name) for name in names]
        for name in names:
            if name in self._removing:
                raise refusal(errno.ENOENT, name)
        if self._users.total() + len(names) > self._room:
            raise refusal(errno.EMFILE, names[0])
        self._users.update(names)
        return paths

    def release(self, names: Iterable[str]) -> None:
        """Count the volumes `names` as used by one live job less."""
        self._users.subtract(names)

    def path(self, name: str) -> str:
        """The path of a volume's image, which may be missing. Raises SandboxError, EPERM."""
        if self._image_settings is None:
            raise refusal(errno.EPERM, name)
        return f"{self._image_settings.directory}/{name}{_SUFFIX}"

    def list(self, chores: Chores, done: Done) -> None:
        """Pass a message about all volumes to `done`: their sizes in bytes and their live jobs."""
        if self._image_settings is None:
            done({"volumes": []})
            return

        def add_users(outcome: Message) -> None:
            volumes = outcome.get("volumes", [])
            assert isinstance(volumes, list)
            for volume in volumes:
                volume["jobs"] = self._users[volume["name"]]
            self._log_strange(outcome.pop("strange", []))
            done(outcome)

        _start(chores, partial(_list, self._image_settings.directory), add_users, "")

    def _log_strange(self, strange: object) -> None:
        """Log each file in the directory that is no volume, once for as long as it stays."""
        assert isinstance(strange, list)
        self._logged &= {name for name, _ in strange}
        for name, why in strange:
            if name not in self._logged:
                self._logged.add(name)
                log_line(f"{name} in the directory of volumes is no volume and is left out: {why}")

    def remove(self, chores: Chores, name: str, done: Done) -> None:
        """Remove a volume and its content, then call `done`.

        Raises SandboxError: EBUSY if a live job uses it, ENOENT if it is being removed already.
        """
        path = self.path(name)
        if name in self._removing:
            raise refusal(errno.ENOENT, name)
        if self._users[name] > 0:
            raise refusal(errno.EBUSY, name)

        def removed(outcome: Message) -> None:
            self._removing.discard(name)
            done(outcome)

        _start(chores, partial(_remove, path), removed, name)
        self._removing.add(name)

    def make(self, chores: Chores, name: str, size: int, done: Done, *, thin: bool) -> None:
        """Make a volume of `size` bytes, then call `done`. Raises SandboxError."""
        path = self.path(name)
        assert self._image_settings is not None
        _start(
            chores,
            partial(_make, self._image_settings._replace(reserve=not thin), path, size),
            done,
            name,
        )


def _start(chores: Chores, work: partial[Message], done: Done, name: str) -> None:
    """Start a chore that reports a failure as one of the volume `name`; "" stands for all."""

    def add_volume(outcome: Message) -> None:
        if "errno" in outcome:
            outcome = {**outcome, "step": "volume", "detail": name, "why": outcome.get("detail")}
        done(outcome)

    try:
        chores.start(work, add_volume)
    except OSError as error:
        raise refusal(error.errno or errno.EIO, name) from error


def refusal(code: int, name: str) -> SandboxError:
    """The error for a volume, from which the service makes a message for the client."""
    return SandboxError(
        f"cannot use the volume {name}: {os.strerror(code)}",
        data={"step": "volume", "errno": code, "detail": name},
    )


# --- in a process of its own --------------------------------------------------------------------


def _list(directory: str) -> Message:
    """All volumes in `directory`, and up to `_MAX_STRANGE` files that look like one but are none.

    Other programs may put files there, such as a backup that was interrupted. Such a file must not
    make the whole list fail.
    """
    found: list[dict[str, object]] = []
    strange: list[tuple[str, str]] = []
    for file in sorted(os.listdir(directory)):
        name = file.removesuffix(_SUFFIX)
        if name == file:
            continue
        listed = "no volume can have its name" if name_fault(name) else _describe(directory, name)
        if isinstance(listed, str):
            strange.append((ascii(file), listed))
        elif listed is not None:
            found.append(listed)
    return {"volumes": found, "strange": strange[:_MAX_STRANGE]}


def _describe(directory: str, name: str) -> dict[str, object] | str | None:
    """A volume's entry in the list, or the reason why it is none; None if it is gone meanwhile."""
    path = f"{directory}/{name}{_SUFFIX}"
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO waits; a device may act
            return "it is no regular file"
        if not MIN_DISK_BYTES <= status.st_size <= MAX_DISK_BYTES:
            return f"no volume can have its size of {status.st_size} bytes"
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


def _make(image_settings: ImageSettings, path: str, size: int) -> Message:
    """Make an image, write it out and link it to `path`. Raises OSError."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    label = disk_images.RESERVED_LABEL if image_settings.reserve else ""
    image = disk_images.create(image_settings._replace(label=label), size, journal=True)
    if image_settings.reserve:
        disk_images.mark_reserved(image)
    os.fsync(image)
    directory = os.open(image_settings.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # With `src_dir_fd` Python calls linkat(2), which follows the link in /proc to the image.
    os.link(f"/proc/self/fd/{image}", path, src_dir_fd=directory, follow_symlinks=True)
    os.fsync(directory)
    return {}
