"""The directory of a job's output: its three files, made and opened safely.

`stdout`, `stderr` and `index` stand in a directory of their own, are reached by its descriptor
only, and never through a link (O_NOFOLLOW): who can rename the directory cannot make the service
write elsewhere. They are made anew or not at all (O_EXCL), mode 0600. The lock of the one writer
is flock(2) on the index, which ends with the process; readers of sealed files share one, so that
what is read is not removed.

A directory that goes is renamed first, `7` to `7.removed`, and stays under that name, with nothing
but the note, until the history has noted the removal and how the job ended. So whoever finds no `7`
can tell a removal by this program, in whichever process, from a directory that another hand moved
or that a disk which is not mounted has. Its sticky bit says that the name is ours: a directory that
somebody else has called so is left alone. Neither needs a block on most file systems: it works on a
full disk. Where the disk refuses it, the files go all the same. A copy may have lost the bit: then
the name is ours where nothing stands there but the job's note, which nobody else makes.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from jobworker.errors import Busy, JobworkerError, NotFound, OutOfDescriptors, OutputError
from jobworker.model.job import OutputCut
from jobworker.regular_file import open_regular
from jobworker.serialization.json_text import loads

NAMES = ("stdout", "stderr", "index")
NOTE = "record"
"""See `job_note`: it may stand beside the three, and goes with them."""
MAX_NOTE_BYTES = 16 << 20
"""More is no note of ours: a request has a megabyte of arguments, and few lines follow."""
_REMOVED = ".removed"
_REMEDIES = {
    errno.ENOSPC: "make room where output is kept",
    errno.EDQUOT: "make room where output is kept",
    errno.EIO: "see what the kernel's log says of the disk where output is kept",
    errno.ENOENT: "see whether the disk with worker.state_dir is mounted, and put the directory "
    "service/spool back there",
}


def mark_of(directory: Path) -> Path:
    """Where a directory of ours says that the output in `directory` was removed."""
    return directory.with_name(f"{directory.name}{_REMOVED}")


def marked_job(name: str) -> str:
    """The name of the directory that was removed, where `name` is that of a mark; else ""."""
    return name.removesuffix(_REMOVED) if name.endswith(_REMOVED) else ""


def was_removed(directory: Path) -> bool:
    """Whether this program has removed the output in `directory`: else it is there, or missing.

    Raises OutputError where that cannot be told.
    """
    with disk_errors("look for"):
        return _is_mark(mark_of(directory)) and not os.path.lexists(directory)


def _is_mark(path: Path) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        return False
    if status.st_mode & stat.S_ISVTX:
        return True
    try:
        names = os.listdir(path)
        return not names or (names == [NOTE] and _is_note(path / NOTE, marked_job(path.name)))
    except (PermissionError, FileNotFoundError):  # another user's, or gone just now
        return False


def _is_note(path: Path, job: str) -> bool:
    """Whether what stands at `path` is the note of a job. Raises OSError."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        line = file.readline(MAX_NOTE_BYTES)
    try:
        first = loads(line.decode())
    except (JobworkerError, UnicodeDecodeError):
        return False
    return isinstance(first, dict) and "spec" in first and str(first.get("id")) == job


def clear_mark(directory: Path) -> None:
    """Remove the mark, which the history has noted; one that is not there is fine."""
    mark = mark_of(directory)
    with suppress(OSError):
        if _is_mark(mark):
            _unlink_files(mark)
            os.rmdir(mark)


@contextmanager
def disk_errors(verb: str, directory: Path | None = None) -> Iterator[None]:
    """Turn the errors of the disk into OutputError, which names the `directory` if one is given.

    "Nothing there now" passes. Raises OutOfDescriptors where it is not the disk but the process
    that is at its limit.
    """
    what = "the job's output" if directory is None else f"the job's output in {directory}"
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OutOfDescriptors(
                f"cannot {verb} {what}: {error.strerror}",
                remedy="try again later, or raise the service's LimitNOFILE",
            ) from error
        remedy = _REMEDIES.get(error.errno or 0, "")
        if error.errno in (errno.EACCES, errno.EPERM) and directory is not None:
            remedy = (
                "give it back to the service's user: "
                f"chown -R {os.geteuid()} {directory} && chmod -R u+rwX {directory}"
            )
        raise OutputError(
            f"cannot {verb} {what}: {error.strerror}",
            remedy=remedy,
            data={"cut": OutputCut.DISK.value},
        ) from error


@contextmanager
def full_disk_may_refuse() -> Iterator[None]:
    """Let it pass that there is no room; other errors are errors."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def create_files(directory: Path) -> list[int]:
    """Make the files, to read and write, in the order of NAMES, locked for this process.

    `directory` is made too where it is missing (mode 0700). Raises OutputError where a file
    exists, as a link too, or cannot be made; none of this call's making is left then.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    fds: list[int] = []
    with disk_errors("create"), ExitStack() as undo:
        try:
            os.mkdir(directory, 0o700)
            undo.callback(os.rmdir, directory)
        except FileExistsError:
            pass
        dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        undo.callback(os.close, dir_fd)
        for name in NAMES:
            fds.append(os.open(name, flags, 0o600, dir_fd=dir_fd))
            undo.callback(os.unlink, name, dir_fd=dir_fd)
            undo.callback(os.close, fds[-1])
        fcntl.flock(fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        undo.pop_all()
        os.close(dir_fd)
    return fds


def open_files(directory: Path, *, writable: bool, partial: bool = False) -> list[int]:
    """Open the files in the order of NAMES; locked for this process where they are `writable`.

    With `partial` an empty file stands for one that is missing. Raises NotFound where one is
    missing, Busy where another has the lock, OutputError otherwise.
    """
    mode = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW
    fds: list[int] = []
    with disk_errors("open", directory), ExitStack() as undo:
        try:
            dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            undo.callback(os.close, dir_fd)
            for name in NAMES:
                try:
                    fds.append(open_regular(name, mode, dir_fd=dir_fd))
                except FileNotFoundError:
                    if not partial:
                        raise
                    fds.append(os.memfd_create(f"no {name}"))
                undo.callback(os.close, fds[-1])
        except FileNotFoundError:
            raise NotFound("cannot open the job's output: none is kept") from None
        if writable:
            _lock(fds[-1])
        undo.pop_all()
        os.close(dir_fd)
    return fds


def lock_to_read(index: int) -> None:
    """Keep others from removing sealed files while they are read; ends with the descriptor.

    Where one is just removing them nothing is lost: what is open can be read to its end.
    """
    with suppress(BlockingIOError):
        fcntl.flock(index, fcntl.LOCK_SH | fcntl.LOCK_NB)


def remove_files(directory: Path, index: int, *, force: bool) -> None:
    """Remove the files and leave the mark. Raises Busy where somebody reads them (not if forced).

    The directory's name, which readers need first, goes before the rest: none finds half of a log.
    The note stays in the mark, if there is one, or goes last.
    """
    with disk_errors("remove", directory):
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not force:
                raise Busy("cannot remove the job's output: it is being read") from None
        dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            clear_mark(directory)  # of an earlier removal: this output was put back since
            marked = False
            with suppress(OSError):
                os.fchmod(dir_fd, 0o700 | stat.S_ISVTX)
                os.rename(directory, mark_of(directory))
                marked = True
            _unlink_below(dir_fd, () if marked else (NOTE,))
        finally:
            os.close(dir_fd)
        if not marked:
            os.rmdir(directory)


def _unlink_files(directory: Path) -> None:
    dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _unlink_below(dir_fd, (NOTE,))
    finally:
        os.close(dir_fd)


def _unlink_below(dir_fd: int, others: tuple[str, ...]) -> None:
    """Remove the three files, and `others`; the index before the data, where the name stays."""
    for name in (*reversed(NAMES), *others):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=dir_fd)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy("cannot open the job's output: it is being written") from None
