"""Makes the launcher of an ordinary user root of a user namespace of its own.

An ordinary user may make a user namespace (user_namespaces(7)) and has every capability in it. That
is enough to mount, to pivot and to make further namespaces, one for each job. From then on the
launcher works as under root. Only the ids differ:

    root            each job gets its own range out of all ids of the host
    a range         /etc/subuid and /etc/subgid give this user ids (subuid(5)), and each job gets a
                    part of them; newuidmap(1), a program with the right to do so, writes the maps
    a single id     without these files or programs, every job has this user's id on the host. Only
                    namespaces separate jobs, and jobs keep the user's supplementary groups.

Raises HostUnsupported if the host forbids it; the remedy names the setting to change.

Standard library only.
"""

import errno
import os
import pwd
from typing import NamedTuple, NoReturn

from jobworker.errors import HostUnsupported
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.host_restrictions import user_namespace_remedy
from jobworker.sandbox.user_namespaces import IDS_PER_JOB, Ids

MIN_IDS_PER_JOB = 64
"""With fewer ids per job a range is not used: Debian's system users have ids up to 42, and its
dynamic users begin at 100."""
_TOOLS = {"newuidmap": "/etc/subuid", "newgidmap": "/etc/subgid"}


class SubidRange(NamedTuple):
    """A range of ids of the host."""

    first: int
    length: int


SINGLE_ID = Ids(
    first=0,
    each=1,
    step=0,
    gaps=(
        "all jobs run as this user on the host: only namespaces separate them, and they keep its "
        "supplementary groups (install uidmap and give the user a range in /etc/subuid and "
        "/etc/subgid)",
    ),
)


def split(count: int, jobs: int) -> Ids:
    """Divide the ids from 1 to `count` between `jobs` jobs.

    Returns `SINGLE_ID` if a job would get fewer than `MIN_IDS_PER_JOB`.
    """
    each = min(count // jobs, IDS_PER_JOB)
    return Ids(1, each, each) if each >= MIN_IDS_PER_JOB else SINGLE_ID


def granted(text: str, user: str, uid: int) -> SubidRange | None:
    """The largest range that a subuid(5) file gives to a user, by name or number."""
    found = []
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 3 and fields[0] in (user, str(uid)) and "".join(fields[1:]).isdecimal():
            found.append(SubidRange(int(fields[1]), int(fields[2])))
    return max(found, key=lambda each: each.length, default=None)


def become_root() -> int:
    """Go on as root of a new user namespace. The caller has one thread and is not root.

    Returns how many ids the namespace has from 1 on, for `split`. Raises HostUnsupported.
    """
    uid, gid = os.geteuid(), os.getegid()
    ranges = _ranges(uid)
    waiting, made = os.pipe2(os.O_CLOEXEC)
    # The helper stays in the outer namespace, whose ids the maps name.
    helper = os.fork() if ranges else None
    if helper == 0:
        _write_ranges(waiting, made, uid, gid, ranges)
    try:
        sc.unshare(sc.CLONE_NEWUSER)
        if helper is None:
            _write_single(uid, gid)
        else:
            os.write(made, b"!")
    except OSError as error:
        raise _forbidden(error) from error
    finally:
        os.close(waiting)
        os.close(made)
        if helper is not None:
            _, status = os.waitpid(helper, 0)
    if helper is not None and status:
        raise HostUnsupported(
            "cannot map this user's ranges of ids: newuidmap or newgidmap refused",
            remedy="correct /etc/subuid and /etc/subgid, or take this user out of them",
        )
    try:
        # Some hosts allow the namespace but take all capabilities away: then this call fails. The
        # launcher also needs a right over the UTS namespace that `host_names` returns to.
        sc.unshare(sc.CLONE_NEWUTS)
    except OSError as error:
        raise _forbidden(error) from error
    return min((each.length for each in ranges), default=0)


def _forbidden(error: OSError) -> HostUnsupported:
    # user_namespaces(7): ENOSPC is the error if the limit on their number is reached.
    limited = error.errno == errno.ENOSPC
    reason = "the host's limit on them is reached" if limited else error.strerror
    return HostUnsupported(
        f"cannot make a user namespace: {reason}",
        remedy=f"{user_namespace_remedy(root=False)}, or start the service as root",
    )


def _ranges(uid: int) -> tuple[SubidRange, ...]:
    """This user's ranges of uids and of gids; empty if a range or a program is missing."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = ""
    found = []
    for tool, file in _TOOLS.items():
        try:
            with open(file, encoding="utf-8") as text:
                given = granted(text.read(), name, uid)
        except OSError:
            return ()
        if given is None or not os.access(f"/usr/bin/{tool}", os.X_OK):
            return ()
        found.append(given)
    return tuple(found)


def _write_single(uid: int, gid: int) -> None:
    for name, text in (
        ("setgroups", "deny"),  # else the kernel refuses a gid_map from an ordinary user
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _write_ranges(
    waiting: int, made: int, uid: int, gid: int, ranges: tuple[SubidRange, ...]
) -> NoReturn:
    """In the helper: wait until the namespace exists, then run the programs that write its maps."""
    code = 1
    try:
        os.close(made)
        if os.read(waiting, 1):
            target = str(os.getppid())
            for tool, own, given in zip(_TOOLS, (uid, gid), ranges, strict=True):
                maps = map(str, (0, own, 1, 1, given.first, given.length))
                arguments = [tool, target, *maps]
                if os.spawnve(os.P_WAIT, f"/usr/bin/{tool}", arguments, {}):  # noqa: S606
                    os._exit(code)
            code = 0
    finally:
        os._exit(code)
