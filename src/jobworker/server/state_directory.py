"""The state directory: what stands where, whose it is, and who has it.

    state_dir/          root's, or the user's who runs the service; only the launcher writes here
      lock              held as long as the service lives
      launcher.lock     held as long as the launcher lives
      stage/            where the launcher mounts the jobs' root, in a namespace of its own
      scratch/          the jobs' files
      volumes/          disks that outlive jobs
      service/          the unprivileged user's: history.db, spool/

Two locks, since a launcher may outlive services: each lock is flock(2) on an open file, which
ends with the last process that holds it, however that one ends.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobworker.errors import ConfigError

LEAVING_SECONDS = 15.0
"""How long the launcher of a service that was killed may take to end its jobs and leave."""
_PAUSE_SECONDS = 0.02


def make_state_directory(state: Path) -> None:
    """Make what is missing of it, for this user alone. Raises ConfigError."""
    own = os.geteuid()
    with _state_errors(state):
        # The unprivileged service has to pass; where there is no other user, nobody has to.
        state.mkdir(mode=0o700 if own else 0o755, parents=True, exist_ok=True)
        status = state.stat(follow_symlinks=False)
        if status.st_uid != own or status.st_mode & 0o022:
            raise ConfigError(
                f"cannot use worker.state_dir {state}: others than user {own} may write to it",
                remedy=f"chown {own} {state}; chmod 755 {state}",
            )
        for name in ("stage", "scratch", "volumes"):
            (state / name).mkdir(mode=0o700, exist_ok=True)


def make_service_directory(state: Path, uid: int, gid: int) -> None:
    """Make the service's own part of it. Raises ConfigError."""
    with _state_errors(state):
        for own in (state / "service", state / "service" / "spool"):
            own.mkdir(mode=0o700, exist_ok=True)
            os.chown(own, uid, gid, follow_symlinks=False)


def lock_for_service(state: Path) -> int:
    """The descriptor of the service's lock. Raises ConfigError where another service has it."""
    lock = _lock(state, "lock", 0)
    if lock is None:
        raise ConfigError(
            f"cannot use worker.state_dir {state}: another service is running with it",
            remedy="stop that service, or give this one a state_dir of its own",
        )
    return lock


def lock_for_launcher(state: Path, patience_seconds: float) -> int:
    """The descriptor of the launcher's lock.

    Waits for one that is about to leave. Raises ConfigError where another launcher stays.
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
        raise ConfigError(
            f"cannot use worker.state_dir {state}: {error.strerror} ({error.filename})",
            remedy="name a directory that root owns and only root may write to",
        ) from error
