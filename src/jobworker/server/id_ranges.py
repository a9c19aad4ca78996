"""The user ids of one service and of its jobs, locked against every other service of this host.

Two services with overlapping ranges would run jobs of the same user ids: what the kernel counts by
user would be shared, and one job's files would belong to another. So each launcher holds a write
lock on its part of one file: byte N stands for the user id N, and the kernel itself finds overlaps.
The lock belongs to an open file (F_OFD_SETLK, fcntl(2)), which the launcher and its children share:
it ends with the last of them, however they end, and no stale lock can stay.

A service that becomes no user of the host has an id of its own (`lock_own_id`), by the path of its
state directory: no setting changes it, and no file has to tell it. What is copied or restored from
elsewhere can name no wrong one then, whomever it belongs to. The service locks its id itself.

Programs that take no such lock, such as an earlier version of this one, are found by the maps of
their user namespaces and by their processes' own ids (/proc/PID/uid_map, user_namespaces(7)).

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
"""How long the jobs of a launcher that was killed may take to die."""
_LOCKED_SECONDS = 2.0
"""How long a launcher that is about to exit may keep its lock beyond that on its directory."""
_PAUSE_SECONDS = 0.05
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid."""


@frozen
class Span:
    """Ids from `first` to `last`, both included."""

    first: int
    last: int

    def overlaps(self, other: "Span") -> bool:
        """Whether an id is in both."""
        return self.first <= other.last and other.first <= self.last

    def __contains__(self, one: object) -> bool:
        return isinstance(one, int) and self.first <= one <= self.last


_OWN = Span(LAST_UID - 16 * IDS_PER_JOB + 1, LAST_UID)
"""Services' own ids: so many that hardly two state directories of a host come to the same one."""
_OWN_ELSEWHERE = Span((1 << 32) - 2 - IDS_PER_JOB, (1 << 32) - 3)
"""For a service whose jobs have all of the former."""
_AREAS = ((FIRST_UID, _OWN.first - 1), (1 << 31, _OWN_ELSEWHERE.first - 1))
"""Where a free range is looked for: first the ids that systemd's allotment leaves free, then those
that no allotment knows at all. The first is searched from its end, since services with a range of
their configuration have theirs at its beginning."""


@frozen
class LockedIds:
    """A range that is ours while the descriptor, or a duplicate of it, is open."""

    first: int
    descriptor: int


def span_of(first: int, places: int) -> Span:
    """All ids of a service whose jobs have `config.places` ranges from `first` on.

    Behind the jobs' ranges stand the id that the service had in earlier versions, and one for each
    job's gateway.
    """
    return Span(first, first + places * IDS_PER_JOB + places)


def lock_ids(settings: Settings) -> LockedIds:
    """Lock the ids of `settings`, or free ones where `first_uid` is 0. Raises ConfigError.

    Root alone may call this.
    """
    first, places = settings.sandbox.first_uid, places_of(settings)
    with _opened() as descriptor:
        if first:
            _lock_these(descriptor, first, places)
        else:
            first = _lock_free(descriptor, places)
        return LockedIds(first, os.dup(descriptor))


def lock_own_id(state: Path, jobs: Span) -> LockedIds:
    """Lock the id that the service of this state directory has for its own.

    It is always `own_id`, but where others have that, or the ranges of its own `jobs` lie there.
    Root alone may call this. Raises ConfigError.
    """
    wanted = own_id(state)
    places = (jobs.last - jobs.first + 1) // IDS_PER_JOB
    own_jobs = span_of(jobs.first, places)
    with _opened() as descriptor:
        # What was killed, or its helpers, may be about to leave.
        until = time.monotonic() + (0 if wanted in own_jobs else _LOCKED_SECONDS)
        while True:
            used = [own_jobs, *(span for _, span in _users())]
            if _lock_id_of(descriptor, Span(wanted, wanted), used) is not None:
                return LockedIds(wanted, os.dup(descriptor))
            if time.monotonic() >= until:
                break
            time.sleep(_PAUSE_SECONDS)
        for span in (Span(wanted, _OWN.last), Span(_OWN.first, wanted - 1), _OWN_ELSEWHERE):
            found = _lock_id_of(descriptor, span, used)
            if found is not None:
                return LockedIds(found, os.dup(descriptor))
    raise ConfigError(
        "cannot find an id for the service's own: others of this host have all of "
        f"{_OWN.first} to {_OWN.last}",
        remedy="make it a user of its own (useradd --system jobworker)",
    )


def own_id(state: Path) -> int:
    """The id of the service of this state directory, as long as nobody else has it."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(state))).digest()
    return _OWN.first + int.from_bytes(digest[:8]) % (_OWN.last - _OWN.first + 1)


def _lock_id_of(descriptor: int, span: Span, used: Sequence[Span]) -> int | None:
    """Lock the first id of these that is free; None where none is."""
    at = span.first
    while at <= span.last:
        taken = Span(at, at) if _is_known(at) else _taken(descriptor, Span(at, at), used)
        if taken is None:
            return at
        at = taken.last + 1
    return None


def _is_known(uid: int) -> bool:
    """Whether it is a user or group of this host."""
    with suppress(KeyError):
        pwd.getpwuid(uid)
        return True
    with suppress(KeyError):
        grp.getgrgid(uid)
        return True
    return False


def job_ids(settings: Settings) -> Span:
    """The ids of all jobs of these settings."""
    first = settings.sandbox.first_uid
    return Span(first, first + places_of(settings) * IDS_PER_JOB - 1)


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
    # Nothing behind them: a service of an earlier version, whose launcher has just ended, may live.
    ranges = Span(first, first + places * IDS_PER_JOB - 1)
    until = time.monotonic() + LEAVING_SECONDS
    while (found := _user_of(ranges)) is not None:
        if time.monotonic() >= until:
            raise _in_use(wanted, f"process {found[0]} has {found[1].first} to {found[1].last}")
        time.sleep(_PAUSE_SECONDS)


def _in_use(wanted: Span, why: str) -> ConfigError:
    return ConfigError(
        f"cannot use the ids {wanted.first} to {wanted.last} for jobs: {why}",
        remedy="stop what uses them, or give this service a sandbox.first_uid of its own: another "
        "number, or 0 for a range that is free",
    )


def _lock_free(descriptor: int, places: int) -> int:
    """Lock the first range that is free, and answer where it begins."""
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


def _taken(descriptor: int, wanted: Span, used: Sequence[Span]) -> Span | None:
    """Who has some of these ids; None where nobody has, and then we have locked them."""
    for span in used:
        if span.overlaps(wanted):
            return span
    return _lock(descriptor, wanted)


def _lock(descriptor: int, span: Span) -> Span | None:
    """Lock these bytes; answers what another has locked of them, if anything."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, span.first, span.last - span.first + 1, 0)
    while True:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: fcntl(2)
            found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted)
            kind, _, first, length, _ = _FLOCK.unpack(found)
            if kind != fcntl.F_UNLCK:  # else it has just been let go
                return Span(first, first + length - 1)
        else:
            return None


def _user_of(span: Span) -> tuple[int, Span] | None:
    """A process that uses some of these ids, and which it has."""
    return next((found for found in _users() if found[1].overlaps(span)), None)


def _users() -> Iterator[tuple[int, Span]]:
    """Which ids processes have, by themselves or by the map of their user namespace."""
    own = Path("/proc/self/uid_map").read_text()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError, ValueError):  # it has just ended
            uid = os.stat(f"/proc/{name}").st_uid
            if uid:
                yield int(name), Span(uid, uid)
            text = Path(f"/proc/{name}/uid_map").read_text()
            if text == own:
                continue
            for line in text.splitlines():
                _, first, count = map(int, line.split())
                if first:  # a map from 0 on is that of the whole host
                    yield int(name), Span(first, first + count - 1)
