"""The user ids of one service and of its jobs, locked against every other service of this host.

Two services with overlapping ranges would run jobs with the same user ids. Then the kernel's limits
for each user would be shared, and one job's files would belong to another. So each launcher holds a
write lock on its part of one file. Byte N stands for the user id N, so the kernel finds overlaps.
The lock belongs to an open file description (F_OFD_SETLK, fcntl(2)), which the launcher and its
children share. The kernel releases it with the last of them, however they end, so no stale lock can
stay.

A service that becomes no user of the host has an id of its own (`lock_own_id`), which follows from
the path of its state directory. No setting changes it, and no file stores it. So a state directory
that is copied or restored from elsewhere cannot name a wrong id, whoever owns it. The service locks
its id itself.

Some programs take no such lock, such as an earlier version of this one. Their ids are found by the
maps of their user namespaces and by the ids of their processes (/proc/PID/uid_map,
user_namespaces(7)).

Ordinary users have no range of their own choice: see `sandbox.launcher.own_namespace`.
"""

import fcntl
import grp
import hashlib
import os
import pwd
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import frozen

from jobworker.config.settings import FIRST_UID, LAST_UID, Settings
from jobworker.errors import ConfigError
from jobworker.sandbox.user_namespaces import IDS_PER_JOB

LOCK_FILE = Path("/run/jobworker.ids")
"""In /run, which all services of a host share and which only root may write to."""
LEAVING_SECONDS = 15.0
"""How long the jobs of a killed launcher may take to die."""
_LOCKED_SECONDS = 2.0
"""How long an exiting launcher may hold this lock after it has released its state directory's."""
_PAUSE_SECONDS = 0.05
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid."""


@frozen
class IdRange:
    """Ids from `first` to `last`, both included."""

    first: int
    last: int

    def overlaps(self, other: "IdRange") -> bool:
        """Whether an id is in both."""
        return self.first <= other.last and other.first <= self.last

    def __contains__(self, one: object) -> bool:
        return isinstance(one, int) and self.first <= one <= self.last


_OWN = IdRange(LAST_UID - 16 * IDS_PER_JOB + 1, LAST_UID)
"""The ids that services may have for their own: so many that two state directories of a host hardly
ever get the same one."""
_OWN_ELSEWHERE = IdRange((1 << 32) - 2 - IDS_PER_JOB, (1 << 32) - 3)
"""The ids for a service whose jobs have all ids of `_OWN`."""
_AREAS = ((FIRST_UID, _OWN.first - 1), (1 << 31, _OWN_ELSEWHERE.first - 1))
"""The areas in which a free range is searched: first the ids that systemd's allotment leaves free,
then the ids that are in no allotment. The search of the first area begins at its end, since
services with a configured range have theirs at its beginning."""


@frozen
class LockedIds:
    """A locked range of ids; the lock lasts while the descriptor, or a duplicate of it, is open."""

    first: int
    descriptor: int


def span_of(first: int, places: int) -> IdRange:
    """All ids of a service whose jobs have `places` ranges from `first` on.

    After the jobs' ranges come one id for the service itself in earlier versions, and one id for
    each job's gateway.
    """
    return IdRange(first, first + places * IDS_PER_JOB + places)


def lock_ids(settings: Settings) -> LockedIds:
    """Lock the ids of `settings`, or a free range if `first_uid` is 0. Raises ConfigError.

    Only root may call this.
    """
    first, places = settings.sandbox.first_uid, places_of(settings)
    with _opened() as descriptor:
        if first:
            _lock_these(descriptor, first, places)
        else:
            first = _lock_free(descriptor, places)
        return LockedIds(first, os.dup(descriptor))


def lock_own_id(state: Path, jobs: IdRange) -> LockedIds:
    """Lock an id for the service of this state directory itself.

    The id is `own_id`, unless others have that one or it is among the ids of its own `jobs`. Only
    root may call this. Raises ConfigError.
    """
    wanted = own_id(state)
    places = (jobs.last - jobs.first + 1) // IDS_PER_JOB
    own_jobs = span_of(jobs.first, places)
    with _opened() as descriptor:
        # A service that was killed, or its child processes, may be about to exit.
        until = time.monotonic() + (0 if wanted in own_jobs else _LOCKED_SECONDS)
        while True:
            used = [own_jobs, *(span for _, span in _users())]
            if _lock_id_of(descriptor, IdRange(wanted, wanted), used) is not None:
                return LockedIds(wanted, os.dup(descriptor))
            if time.monotonic() >= until:
                break
            time.sleep(_PAUSE_SECONDS)
        for span in (IdRange(wanted, _OWN.last), IdRange(_OWN.first, wanted - 1), _OWN_ELSEWHERE):
            found = _lock_id_of(descriptor, span, used)
            if found is not None:
                return LockedIds(found, os.dup(descriptor))
    raise ConfigError(
        "cannot find an id for the service's own: others of this host have all of "
        f"{_OWN.first} to {_OWN.last}",
        remedy="make it a user of its own (useradd --system jobworker)",
    )


def own_id(state: Path) -> int:
    """The id of the service of this state directory, unless another user or service has it."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(state))).digest()
    return _OWN.first + int.from_bytes(digest[:8]) % (_OWN.last - _OWN.first + 1)


def _lock_id_of(descriptor: int, span: IdRange, used: Sequence[IdRange]) -> int | None:
    """Lock the first free id of `span` and return it; None if none is free."""
    at = span.first
    while at <= span.last:
        taken = IdRange(at, at) if _is_known(at) else _taken(descriptor, IdRange(at, at), used)
        if taken is None:
            return at
        at = taken.last + 1
    return None


def _is_known(uid: int) -> bool:
    """Whether this host has a user or group with this id."""
    with suppress(KeyError):
        pwd.getpwuid(uid)
        return True
    with suppress(KeyError):
        grp.getgrgid(uid)
        return True
    return False


def job_ids(settings: Settings) -> IdRange:
    """The ids of all jobs of these settings."""
    first = settings.sandbox.first_uid
    return IdRange(first, first + places_of(settings) * IDS_PER_JOB - 1)


def places_of(settings: Settings) -> int:
    """How many ranges of ids the jobs of these settings may have at a time."""
    worker, sandbox = settings.worker, settings.sandbox
    # The launcher never keeps more spares than jobs may run.
    return worker.max_concurrent_jobs + min(sandbox.spares, worker.max_concurrent_jobs)


@contextmanager
def _opened() -> Iterator[int]:
    try:
        descriptor = os.open(
            LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        raise ConfigError(
            f"cannot lock the ids of jobs against other services: {error.strerror} ({LOCK_FILE})",
            remedy=f"let root write to {LOCK_FILE.parent}, which all services of this host share",
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_these(descriptor: int, first: int, places: int) -> None:
    wanted = span_of(first, places)
    until = time.monotonic() + _LOCKED_SECONDS
    while (holder := _lock(descriptor, wanted)) is not None:
        if time.monotonic() >= until:
            raise _in_use(wanted, f"another service has {holder.first} to {holder.last}")
        time.sleep(_PAUSE_SECONDS)
    # Only the jobs' ranges are checked, not the ids after them: a service of an earlier version may
    # still live there, though its launcher has just ended.
    ranges = IdRange(first, first + places * IDS_PER_JOB - 1)
    until = time.monotonic() + LEAVING_SECONDS
    while (found := _user_of(ranges)) is not None:
        if time.monotonic() >= until:
            raise _in_use(wanted, f"process {found[0]} has {found[1].first} to {found[1].last}")
        time.sleep(_PAUSE_SECONDS)


def _in_use(wanted: IdRange, why: str) -> ConfigError:
    return ConfigError(
        f"cannot use the ids {wanted.first} to {wanted.last} for jobs: {why}",
        remedy="stop the processes that use them, or give this service a sandbox.first_uid of its "
        "own: another number, or 0 for a range that is free",
    )


def _lock_free(descriptor: int, places: int) -> int:
    """Lock the first free range, and return its first id."""
    (low, high), (beyond, end) = _AREAS
    used = [span for _, span in _users()]
    size = span_of(0, places).last
    first = _aligned(high - size)
    while first >= low:
        taken = _taken(descriptor, span_of(first, places), used)
        if taken is None:
            return first
        first = _aligned(taken.first - size - 1)
    first = beyond
    while first + size <= end:
        taken = _taken(descriptor, span_of(first, places), used)
        if taken is None:
            return first
        first = _aligned(taken.last + IDS_PER_JOB)
    raise ConfigError(
        f"cannot find {size} ids that are free for the jobs of this service",
        remedy="lower worker.max_concurrent_jobs, or stop other services of this host",
    )


def _aligned(first: int) -> int:
    return first - first % IDS_PER_JOB


def _taken(descriptor: int, wanted: IdRange, used: Sequence[IdRange]) -> IdRange | None:
    """Lock these ids and return None; if others have some of them, return others' ids instead."""
    for span in used:
        if span.overlaps(wanted):
            return span
    return _lock(descriptor, wanted)


def _lock(descriptor: int, span: IdRange) -> IdRange | None:
    """Lock these bytes and return None; if others have locked some, return their range instead."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, span.first, span.last - span.first + 1, 0)
    while True:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: fcntl(2)
            found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted)
            kind, _, first, length, _ = _FLOCK.unpack(found)
            if kind != fcntl.F_UNLCK:  # else its holder has just released it: try again
                return IdRange(first, first + length - 1)
        else:
            return None


def _user_of(span: IdRange) -> tuple[int, IdRange] | None:
    """The pid of a process that uses some of these ids, and the ids that it has; else None."""
    return next((found for found in _users() if found[1].overlaps(span)), None)


def _users() -> Iterator[tuple[int, IdRange]]:
    """Yield pid and ids of processes.

    These are each id that is not root's, and the ranges that a user namespace other than ours maps,
    except for maps from 0 on.
    """
    own = Path("/proc/self/uid_map").read_text()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError, ValueError):  # the process has just ended
            uid = os.stat(f"/proc/{name}").st_uid
            if uid:
                yield int(name), IdRange(uid, uid)
            text = Path(f"/proc/{name}/uid_map").read_text()
            if text == own:
                continue
            for line in text.splitlines():
                _, first, count = map(int, line.split())
                if first:  # a map from 0 on is the whole host's
                    yield int(name), IdRange(first, first + count - 1)
