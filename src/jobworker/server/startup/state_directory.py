"""The state directory: its layout, the owners of its parts, and the locks on it.

    state_dir/          root's, or the user's who runs the service; only the launcher writes here
      lock              held as long as the service lives
      launcher.lock     held as long as the launcher lives
      stage/            where the launcher mounts the jobs' root, in a namespace of its own
      scratch/          the jobs' files
      volumes/          disks that outlive jobs
      service/          the unprivileged user's: history.db, spool/

There are two locks, since a launcher may outlive services. Each lock is flock(2) on an open file.
The kernel releases it with the last process that holds the file open, however that process ends.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobworker.errors import ConfigError

LEAVING_SECONDS = 15.0
"""How long the launcher of a killed service may take to end its jobs and exit."""
_PAUSE_SECONDS = 0.02
_REMEDIES = {
    errno.ENOENT: "name a directory on a disk: the file system there takes no files",
    errno.EEXIST: "move away the file that is in its place",
    errno.ENOTDIR: "move away the file that is in its place",
    errno.EISDIR: "move away the directory that is in its place",
    errno.ELOOP: "put the file itself in place of the link",
    errno.EROFS: "mount that file system read-write, or name a directory on another one",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.ENAMETOOLONG: "give it a shorter path",
}


def holds(state: Path, name: str = "") -> bool:
    """Whether the state directory has an entry of this name; without a name, whether it exists.

    Raises ConfigError if this cannot be read.
    """
    with _state_errors(state):
        return (state / name).exists()


def make_state_directory(state: Path) -> None:
    """Make the missing parts of the state directory, owned by this user. Raises ConfigError.

    Raises it too if another user may write there, or could lead a link in the path elsewhere.
    """
    own = os.geteuid()
    with _state_errors(state):
        _check_link(state, own)
        # With root the unprivileged service must pass through; else there is no other user.
        state.parent.mkdir(parents=True, exist_ok=True)
        state.mkdir(mode=0o700 if own else 0o755, exist_ok=True)
        status = state.stat()
        if status.st_uid != own or status.st_mode & 0o022:
            raise ConfigError(
                f"cannot use worker.state_dir {state}: others than user {own} may write to it",
                remedy=f"chown {own} {state}; chmod 755 {state}",
            )
        for name in ("service", "lock", "launcher.lock"):
            _refuse_link(state, name)
        for name in ("stage", "scratch", "volumes"):
            (state / name).mkdir(mode=0o700, exist_ok=True)


def _check_link(state: Path, own: int) -> None:
    """Raise ConfigError for a link in the state directory's place that another user can change.

    Raises it too for a link that leads to no directory.
    """
    if not state.is_symlink():
        return
    owner = state.lstat().st_uid
    if owner not in (0, own):
        raise ConfigError(
            f"cannot use worker.state_dir {state}: it is a link of user {owner}'s, who may lead it "
            "elsewhere",
            remedy=f"set worker.state_dir to the directory itself, or: chown -h {own} {state}",
        )
    if not state.exists():
        raise ConfigError(
            f"cannot use worker.state_dir {state}: it is a link to {os.readlink(state)}, which "
            "does not exist",
            remedy="make that directory, or mount the disk that holds it",
        )


def _refuse_link(state: Path, name: str) -> None:
    """Raise a ConfigError that names the entry if it is a link: its later opening follows none."""
    if (state / name).is_symlink():
        raise ConfigError(
            f"cannot use worker.state_dir {state}: {name} in it is a link, which is not followed",
            remedy=(
                f"remove {state / name}: the lock is made anew"
                if name.endswith("lock")
                else f"put the directory itself at {state / name}, or mount it there (mount --bind)"
            ),
        )


def make_service_directory(state: Path, uid: int, gid: int) -> None:
    """Make the service's own part of the state directory; `uid` becomes the owner of all its files.

    Files of an earlier service may belong to another user: to an earlier worker.user, or to root if
    they were copied back. Copied files may also be read-only. Raises ConfigError.
    """
    with _state_errors(state):
        for own in (state / "service", state / "service" / "spool"):
            own.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            _give(state / "service", uid, gid)


def _give(service: Path, uid: int, gid: int) -> None:
    """Make this user the owner of the service's directory and of all below it, with write access.

    A directory's owner and mode change after those of all its entries. So if a job's directory has
    the right owner and mode, all in it is right too, and a start need not read it. The user may
    have put anything there, and may still change it. So this function uses descriptors and not
    paths, leaves links alone, and skips a file with a second name, which may be one of root's.
    """

    def give_below(directory: int, *, whole: bool) -> None:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    right = is_right(status)
                    if stat.S_ISDIR(status.st_mode) and (whole or not right):
                        give_below(opened(entry.name, directory), whole=not right)
                    if not right:
                        give(entry.name, directory)
        finally:
            os.close(directory)

    def is_right(status: os.stat_result) -> bool:
        bits = _owner_bits(status)
        return (status.st_uid, status.st_gid, status.st_mode & bits) == (uid, gid, bits)

    def give(name: str | Path, directory: int | None = None) -> None:
        file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        path = f"/proc/self/fd/{file}"
        try:
            status = os.fstat(file)
            if stat.S_ISDIR(status.st_mode) or (
                stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            ):
                os.chown(path, uid, gid)
                os.chmod(path, (status.st_mode & 0o1777) | _owner_bits(status))
        except PermissionError as error:
            raise _may_not_give(Path(os.readlink(path)), uid, error) from error
        finally:
            os.close(file)

    def opened(name: str | Path, directory: int | None = None) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=directory)

    give_below(opened(service), whole=True)
    give(service)


def _may_not_give(path: Path, uid: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot give {path} to the service's user {uid}: {error.strerror}",
        remedy=f"see lsattr -d {path}, and let it be changed: chattr -i -a {path}",
    )


def _owner_bits(status: os.stat_result) -> int:
    """The mode bits that the owner of a directory or file needs."""
    return 0o700 if stat.S_ISDIR(status.st_mode) else 0o600


def lock_for_service(state: Path) -> int:
    """Take the service's lock and return its descriptor.

    Raises ConfigError if another service holds it.
    """
    lock = _lock(state, "lock", 0)
    if lock is None:
        raise ConfigError(
            f"cannot use worker.state_dir {state}: another service is running with it",
            remedy="stop that service, or give this one a state_dir of its own",
        )
    return lock


def lock_for_launcher(state: Path, patience_seconds: float) -> int:
    """Take the launcher's lock and return its descriptor.

    Waits up to `patience_seconds` for an earlier launcher to exit. Raises ConfigError if another
    launcher still holds it.
    """
    lock = _lock(state, "launcher.lock", patience_seconds)
    if lock is None:
        raise ConfigError(
            f"cannot use worker.state_dir {state}: another launcher is running with it",
            remedy="set launcher.socket to where it listens, or stop it",
        )
    return lock


def _lock(state: Path, name: str, patience_seconds: float) -> int | None:
    until = time.monotonic() + patience_seconds
    with _state_errors(state):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(state / name, flags, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= until:
                        os.close(lock)
                        return None
                    time.sleep(_PAUSE_SECONDS)
                else:
                    return lock
        except BaseException:
            os.close(lock)
            raise


@contextmanager
def _state_errors(state: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        user = "this user" if os.geteuid() else "root"
        raise ConfigError(
            f"cannot use worker.state_dir {state}: {error.strerror} ({error.filename})",
            remedy=_REMEDIES.get(
                error.errno or 0, f"name a directory that {user} owns and only {user} may write to"
            ),
        ) from error
