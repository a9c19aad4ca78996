"""Write files whole and durably; of a set of new files, all or none.

A private key has mode 0600 from the moment its file is created. A new file gets its name by
link(2), which never replaces anything: two concurrent calls cannot mix their sets, and the loser
removes the files that it made. Content and modes come in as arguments; this module does not know
what the files mean.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from jobworker import errors

KEY_MODE, CERTIFICATE_MODE, DIRECTORY_MODE, PARENT_MODE = 0o600, 0o644, 0o700, 0o755


def write_new(directory: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Write files (name: content, mode) that must not exist yet, durably, all or none.

    A missing directory is created with mode 0700; an existing one keeps its mode. Raises
    `CredentialsUnusable`.
    """
    with _directory(directory) as at:
        made: list[str] = []  # the files to remove if this call fails
        try:
            staged: dict[str, str] = {}
            for name, (content, mode) in files.items():
                staged[name] = f".{name}.{secrets.token_hex(8)}"
                with _writing(directory / name):
                    made.append(staged[name])
                    _stage(staged[name], content, mode, at)
            for name, temporary in staged.items():
                with _writing(directory / name):
                    os.link(temporary, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
                    made.append(name)
                    os.unlink(temporary, dir_fd=at)
            with _writing(directory):
                os.fsync(at)
        except BaseException:
            for name in made:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=at)
            raise


def replace(directory: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Write files (name: content, mode), each atomically and durably, in place of existing ones.

    All are on disk under temporary names before the first is renamed, so a full disk or a missing
    right fails before anything is replaced. Raises `CredentialsUnusable`.
    """
    with _directory(directory) as at:
        staged: dict[str, str] = {}
        try:
            for name, (content, mode) in files.items():
                staged[name] = f".{name}.{secrets.token_hex(8)}"
                with _writing(directory / name):
                    _stage(staged[name], content, mode, at)
            for name, temporary in staged.items():
                with _writing(directory / name):
                    os.rename(temporary, name, src_dir_fd=at, dst_dir_fd=at)
            with _writing(directory):
                os.fsync(at)
        except BaseException:
            for temporary in staged.values():
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=at)
            raise


def _stage(temporary: str, content: bytes, mode: int, at: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(temporary, flags, KEY_MODE, dir_fd=at), "wb") as file:
        os.fchmod(file.fileno(), mode)  # ignores the umask; only a certificate gets more than 0600
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    """Open a directory for the block. A missing one is created, and removed if the block fails."""
    fresh = False
    try:
        if not path.exists():
            _make_above(path.parent)
            path.mkdir(mode=DIRECTORY_MODE)
            fresh = True
            path.chmod(DIRECTORY_MODE)
            _sync_entry(path)
        at = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise _unwritable(path, exc) from None
    try:
        yield at
    except BaseException:
        if fresh:
            with suppress(OSError):  # another call may have written its files there meanwhile
                path.rmdir()
        raise
    finally:
        os.close(at)


def _make_above(path: Path) -> None:
    """Create missing parent directories with `PARENT_MODE`, whatever the umask is.

    Every user must be able to pass through them to certificates. A user who could write there could
    replace keys.
    """
    if not path.exists():
        _make_above(path.parent)
        path.mkdir(exist_ok=True)  # another call may create it meanwhile
        path.chmod(PARENT_MODE)


def _sync_entry(path: Path) -> None:
    """Make a new directory's name durable: sync its parent, which has the entry, fsync(2)."""
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Map an OSError of the block, which writes `path`, to `CredentialsUnusable`."""
    try:
        yield
    except FileExistsError:
        raise errors.CredentialsUnusable(
            f"cannot write {path}: it exists already",
            remedy="name another directory, or move the old files away first",
        ) from None
    except OSError as exc:
        raise _unwritable(path, exc) from None


def _unwritable(path: Path, error: OSError) -> errors.CredentialsUnusable:
    return errors.CredentialsUnusable(
        f"cannot write {path}: {os.strerror(error.errno or 0)}",
        remedy="name a directory that this user may write to",
    )
