"""User namespaces made ahead, one for each job, to be entered by setns(2).

Writing the maps of a namespace takes a helper process and costs about a millisecond, which a spare
has behind it; entering one that stands ready costs a tenth of that. A namespace lives as long as
its descriptor and its processes. It maps 65,536 ids from 0 to an unprivileged range, so root
inside is nobody outside. None is used twice: keys that a job leaves are kept by namespace.

Standard library only.
"""

import errno
import os
import signal
from typing import NamedTuple, NoReturn

from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.capabilities import Capability

IDS_PER_JOB = 65_536


class Ids(NamedTuple):
    """The ids that jobs get outside, as the launcher's own user namespace numbers them."""

    first: int
    each: int = IDS_PER_JOB
    """How many a job gets."""
    step: int = IDS_PER_JOB
    """From one job's first id to the next one's; 0 where all jobs have the same."""
    gaps: tuple[str, ...] = ()
    """What this costs in isolation, in words."""

    def first_of(self, index: int) -> int:
        """The first id of the job in this place."""
        return self.first + index * self.step


def make_user_namespace(first_id: int, ids: int = IDS_PER_JOB) -> int:
    """A descriptor of a new user namespace that maps 0… to `first_id`…; the caller closes it.

    Its creator is the user `first_id`: what is counted for each user (inotify instances,
    namespaces, see user_namespaces(7) and proc(5), /proc/sys/user) is counted for that one then,
    and a job cannot use up what the host's root may have.

    Raises OSError: EPERM or ENOSPC where a security module or user.max_user_namespaces forbids it.
    """
    ready, tell = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = sc.clone3(0)
    except OSError:  # no process to be had
        os.close(ready)
        os.close(tell)
        raise
    if pid == 0:
        _hold_namespace(first_id, tell, leave_groups=ids > 1)
    try:
        os.close(tell)
        said = os.read(ready, 8)
        if len(said) != 1 or said[0]:
            code = said[0] if said else errno.ESRCH
            raise OSError(code, os.strerror(code))
        for kind in ("uid_map", "gid_map"):
            descriptor = os.open(f"/proc/{pid}/{kind}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, f"0 {first_id} {ids}\n".encode())
            finally:
                os.close(descriptor)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


def _hold_namespace(first_id: int, tell: int, *, leave_groups: bool) -> NoReturn:
    """In the helper: make the namespace as its user, tell 0 or the errno, and wait for the end."""
    try:
        # The right to make it is kept across the change of user: some hosts deny it to others.
        sc.prctl(sc.PR_SET_KEEPCAPS, 1)
        if leave_groups:  # who has a single id may not, see sandbox.own_namespace
            os.setgroups([])
        os.setresgid(first_id, first_id, first_id)
        os.setresuid(first_id, first_id, first_id)
        sc.capset(frozenset({Capability.SYS_ADMIN}))
        # Its files in /proc went to the root of the whole host with the change of user; the
        # launcher, which has to write the maps there, may be another root.
        sc.prctl(sc.PR_SET_DUMPABLE, 1)
        sc.unshare(sc.CLONE_NEWUSER)
        os.write(tell, b"\0")
        while True:
            signal.pause()
    except OSError as error:
        os.write(tell, bytes([(error.errno or errno.EPERM) & 0xFF]))
    finally:
        os._exit(127)
