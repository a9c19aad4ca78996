"""Volumes: disks in files that outlive jobs, each with its name and size.

An image stands in the service's state directory and is attached to a loop device when a job first
asks for it; it stays attached while the launcher lives, and one that is attached already, by a
launcher that was killed, is used as it is: two devices before one file would ruin it. Every job
that has a volume mounts the same file system, with the ids of its own range.

An image gets its name when it is complete, so that nothing half-made is ever found.

Standard library only. Raises SandboxError with the step "volume", the errno and the name.
"""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NoReturn

from jobworker.errors import SandboxError
from jobworker.sandbox import disk_images
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.disk_images import Workshop

MAX_MAKERS = 4
_SUFFIX = ".img"


class Volumes:
    """All volumes of the service."""

    def __init__(self, workshop: Workshop | None) -> None:
        self._workshop = workshop
        """Where images stand; None where there can be none."""
        self._users: Counter[str] = Counter()
        self._devices: dict[str, tuple[int, str]] = {}
        self._makers: dict[int, str] = {}

    def take(self, names: Sequence[str]) -> list[str]:
        """The loop devices of volumes that a job is about to have; `give_back` them."""
        devices = [self._attach(name) for name in names]
        self._users.update(names)
        return devices

    def give_back(self, names: Iterable[str]) -> None:
        """A job that had these has ended."""
        self._users.subtract(names)

    def find(self, name: str) -> str:
        """The path of a volume's image; one that is not there is refused."""
        path = self._path(name)
        if not os.path.lexists(path):
            raise _refusal(errno.ENOENT, name)
        return path

    def listed(self) -> list[dict[str, object]]:
        """All volumes, by name: sizes in bytes, and how many live jobs have them."""
        found: list[dict[str, object]] = []
        if self._workshop is None:
            return found
        with os.scandir(self._workshop.directory) as entries:
            for entry in entries:
                name, status = entry.name.removesuffix(_SUFFIX), entry.stat()
                if name != entry.name:
                    used = status.st_blocks * 512
                    sizes = {"size_bytes": status.st_size, "used_bytes": used}
                    found.append({"name": name, **sizes, "jobs": self._users[name]})
        return sorted(found, key=lambda volume: str(volume["name"]))

    def remove(self, name: str) -> None:
        """Remove a volume that no live job has, with all that is on it."""
        path = self._path(name)
        if self._users[name] > 0:
            raise _refusal(errno.EBUSY, name)
        try:
            os.unlink(path)
        except OSError as error:
            raise _refusal(error.errno or errno.EIO, name) from None
        device = self._devices.pop(name, None)
        if device is not None:
            os.close(device[0])

    def start_making(self, name: str, size: int) -> int:
        """Have a process make a volume: its pidfd, for `made` once it is readable."""
        path = self._path(name)
        if os.path.lexists(path):
            raise _refusal(errno.EEXIST, name)
        if len(self._makers) >= MAX_MAKERS:
            raise _refusal(errno.EAGAIN, name)
        assert self._workshop is not None
        pid, pidfd = sc.clone3(0)
        if pid == 0:
            _make_and_exit(self._workshop, path, size)
        self._makers[pidfd] = name
        return pidfd

    def made(self, pidfd: int) -> None:
        """Collect a process that has made a volume, or raise why it could not."""
        name = self._makers.pop(pidfd)
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        code = info.si_status if info is not None and info.si_code == os.CLD_EXITED else errno.EINTR
        if code:
            raise _refusal(code, name)

    def _path(self, name: str) -> str:
        if self._workshop is None:
            raise _refusal(errno.EPERM, name)
        return f"{self._workshop.directory}/{name}{_SUFFIX}"

    def _attach(self, name: str) -> str:
        if name not in self._devices:
            try:
                image = os.open(self._path(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    found = disk_images.find_attached(image)
                    self._devices[name] = found or disk_images.attach(image)
                finally:
                    os.close(image)
            except OSError as error:
                raise _refusal(error.errno or errno.EIO, name) from error
        return self._devices[name][1]


def _refusal(code: int, name: str) -> SandboxError:
    return SandboxError(
        f"cannot use the volume {name}: {os.strerror(code)}",
        data={"step": "volume", "errno": code, "detail": name},
    )


def _make_and_exit(workshop: Workshop, path: str, size: int) -> NoReturn:
    """In a process: make an image and give it its name; exit with the errno."""
    code = errno.EIO
    try:
        image = disk_images.create(workshop, size, journal=True)
        os.fsync(image)
        directory = os.open(workshop.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # With a descriptor linkat(2) is called, which can follow the link to a file without name.
        os.link(f"/proc/self/fd/{image}", path, src_dir_fd=directory, follow_symlinks=True)
        os.fsync(directory)
        code = 0
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os._exit(code & 0xFF)
