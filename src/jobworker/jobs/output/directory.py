"""The directory of a job's output: its three files are made, opened and removed safely.

`stdout`, `stderr` and `index` stand in a directory of their own. The service reaches them only by
the directory's descriptor and never through a link (O_NOFOLLOW). So a program that can rename the
directory cannot make the service write elsewhere. The files are only ever made new (O_EXCL), with
mode 0600. The one writer locks the index by flock(2); the kernel drops this lock when the process
ends. Readers of sealed files have a shared lock, so nothing that is being read is removed.

To remove a directory, the service first renames it, such as `7` to `7.removed`: the mark of the
removal. The mark stays, with only the note in it, until the history has recorded the removal and
the end of the job. So if there is no `7`, any process can tell a removal by this program from a
directory that another program has moved, or whose disk is not mounted. A sticky bit distinguishes
the mark from a directory of such a name that this program did not make: the service leaves that one
alone. If a copy has lost the bit, the directory is still a mark if nothing but the job's note
stands in it, since only this program makes notes. On most file systems neither the name nor the
bit needs a block, so a removal works on a full disk. If the disk refuses them, the files are
removed all the same.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from jobworker.errors import Busy, JobworkerError, NotFound, OutOfDescriptors, OutputError
from jobworker.model.job import JobId, OutputCut
from jobworker.regular_file import open_regular
from jobworker.serialization.json_text import loads

NAMES = ("stdout", "stderr", "index")
NOTE = "record"
"""The file of the job's note (`history.job_note`), which may stand beside the three files and is
removed with them."""
MAX_NOTE_BYTES = 16 << 20
"""The most bytes that are read of a note. A request has at most a megabyte of arguments, and few
lines follow it, so no note is larger."""
_REMOVED = ".removed"
_REMEDIES = {
    errno.ENOSPC: "make room where output is kept",
    errno.EDQUOT: "make room where output is kept",
    errno.EIO: "see what the kernel's log says of the disk where output is kept",
    errno.ENOENT: "see whether the disk with worker.state_dir is mounted, and put the directory "
    "service/spool back there",
}


def mark_of(directory: Path) -> Path:
    """The path of the mark that says that the output in `directory` was removed."""
    return directory.with_name(f"{directory.name}{_REMOVED}")


def marked_job(name: str) -> str:
    """The name of the removed directory, if `name` is that of a mark; else ""."""
    return name.removesuffix(_REMOVED) if name.endswith(_REMOVED) else ""


def was_removed(directory: Path) -> bool:
    """Whether this program has removed the output in `directory`.

    False if the output is there, or is missing for another reason. Raises OutputError if the disk
    cannot tell.
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
    except (PermissionError, FileNotFoundError):  # it is another user's, or was just removed
        return False


def _is_note(path: Path, job: str) -> bool:
    """Whether the file at `path` is the note of this job. Raises OSError."""
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
    """Remove the mark of `directory`, if there is one, once the history has the removal.

    Raises nothing: a mark that the disk does not let go stays.
    """
    mark = mark_of(directory)
    with suppress(OSError):
        if _is_mark(mark):
            _unlink_files(mark)
            os.rmdir(mark)


def clear_marks(spools: Path, jobs: Iterable[JobId]) -> None:
    """Remove the marks of these jobs in `spools`; see `clear_mark`."""
    for job in jobs:
        clear_mark(spools / str(job))


@contextmanager
def disk_errors(verb: str, directory: Path | None = None) -> Iterator[None]:
    """Turn an OSError of the block into OutputError, which names the `directory` if one is given.

    `verb` says what the block does, such as "open". Raises OutOfDescriptors if the process or the
    host has too many files open. A BlockingIOError passes unchanged: the page cache or the pipe has
    no bytes now.
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
    """Ignore an OSError of the block if it says that the disk, or the quota, is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def create_files(directory: Path) -> list[int]:
    """Make the files in `directory`, to read and write, and lock them for this process.

    Returns their descriptors in the order of `NAMES`. Makes the directory if it is missing (mode
    0700). Raises OutputError if a file or a link of such a name exists, or if the disk refuses;
    then nothing is left of what this call made.
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


def unmake_files(directory: Path) -> None:
    """Remove the files of output that is not to be, and the directory if nothing else is there.

    Raises nothing: if the disk refuses, the next service finds the directory without a job.
    """
    with suppress(OSError):
        _unlink_files(directory)
        os.rmdir(directory)


def open_files(directory: Path, *, writable: bool, partial: bool = False) -> list[int]:
    """Open the files in `directory`. Returns their descriptors in the order of `NAMES`.

    `writable`: open them to read and write, and lock them for this process. `partial`: replace a
    missing file by an empty one in memory. Raises NotFound if the directory or a file is missing,
    Busy if another process has the lock, OutputError otherwise.
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
    """Lock sealed files, so that no process removes them until the descriptor is closed.

    Does nothing if a process is just removing them: open files can be read to their ends.
    """
    with suppress(BlockingIOError):
        fcntl.flock(index, fcntl.LOCK_SH | fcntl.LOCK_NB)


def remove_files(directory: Path, index: int, *, force: bool) -> None:
    """Remove the files and leave the mark. Raises Busy if they are read or written, OutputError.

    `force`: remove them though they are being read. The rename comes first, so that no new reader
    finds only a part of the files. The note stays in the mark. If the rename fails, there is no
    mark, and the note is removed last.
    """
    with disk_errors("remove", directory):
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not force:
                raise Busy("cannot remove the job's output: it is being read") from None
        dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            clear_mark(directory)  # an earlier removal left one; the output was put back since
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
    """Remove the three files, the index first, and then `others`."""
    for name in (*reversed(NAMES), *others):
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=dir_fd)


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy("cannot open the job's output: it is being written") from None
