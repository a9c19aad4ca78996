"""Makes the user namespace of a job in advance, for its process to enter by setns(2).

Writing the maps of a namespace takes a helper process and about 1 ms. A spare has that behind it,
and entering the namespace takes a tenth of that. A namespace exists as long as a descriptor or a
process of it. It maps 65,536 ids from 0 on to an unprivileged range, so root inside has no rights
outside. Each job gets a new one, since the kernel keeps a job's keys (keyrings(7)) by namespace.

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
    """The user ids of jobs, as numbers of the launcher's own user namespace."""

    first: int
    each: int = IDS_PER_JOB
    """How many ids a job gets."""
    step: int = IDS_PER_JOB
    """The distance between the first ids of two jobs; 0 if all jobs have the same ids."""
    gaps: tuple[str, ...] = ()
    """What isolates jobs less than with root's rights, as sentences for the log."""

    def first_of(self, index: int) -> int:
        """The first id of the job with the slot number `index`."""
        return self.first + index * self.step


def make_user_namespace(first_id: int, ids: int = IDS_PER_JOB) -> int:
    """A descriptor of a new user namespace that maps 0… to `first_id`…; the caller closes it.

    Its creator is the user `first_id`. So the kernel counts inotify instances, namespaces and the
    like for that user (user_namespaces(7), /proc/sys/user in proc(5)), and a job cannot use up the
    numbers of the host's root.

    Raises OSError: EPERM or ENOSPC if a security module or user.max_user_namespaces forbids it.
    """
    ready, notify = os.pipe2(os.O_CLOEXEC)
    try:
        pid, pidfd = sc.clone3(0)
    except OSError:
        os.close(ready)
        os.close(notify)
        raise
    if pid == 0:
        _hold_namespace(first_id, notify, leave_groups=ids > 1)
    try:
        os.close(notify)
        answer = os.read(ready, 8)
        if len(answer) != 1 or answer[0]:
            code = answer[0] if answer else errno.ESRCH
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


def _hold_namespace(first_id: int, notify: int, *, leave_groups: bool) -> NoReturn:
    """In the helper: make the namespace as the user `first_id`, then wait to be killed.

    Writes one byte to `notify`: 0, or the errno if it fails.
    """
    try:
        # Keep CAP_SYS_ADMIN across the change of user, since some hosts require it.
        sc.prctl(sc.PR_SET_KEEPCAPS, 1)
        if leave_groups:  # forbidden with a single id, see sandbox.launcher.own_namespace
            os.setgroups([])
        os.setresgid(first_id, first_id, first_id)
        os.setresuid(first_id, first_id, first_id)
        sc.capset(frozenset({Capability.SYS_ADMIN}))
        # With the change of user the kernel gave the files in /proc/self to the host's root. The
        # launcher has to write the maps there, and may be root of another user namespace.
        sc.prctl(sc.PR_SET_DUMPABLE, 1)
        sc.unshare(sc.CLONE_NEWUSER)
        os.write(notify, b"\0")
        while True:
            signal.pause()
    except OSError as error:
        os.write(notify, bytes([(error.errno or errno.EPERM) & 0xFF]))
    finally:
        os._exit(127)
