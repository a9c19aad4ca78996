"""Makes an error for the client of a refusal by the launcher.

A refusal has the name of a step and the kernel's errno. The error says what failed, why, and what
to do.
"""

import errno
import os
from collections.abc import Mapping

from jobworker.errors import (
    Busy,
    CommandNotExecutable,
    CommandNotFound,
    InvalidParams,
    JobworkerError,
    NotFound,
    SandboxError,
    TooLarge,
    shortened,
)
from jobworker.sandbox.chores import CROWDED
from jobworker.sandbox.protocol.replies import Refusal
from jobworker.sandbox.start.private_network import WALL

_REMEDIES = {
    "enter-user-namespace": "allow user namespaces: sysctl user.max_user_namespaces",
    "mount-disk": "make room where worker.state_dir is, or ask for a smaller disk "
    "(of worker-cli: --max-disk)",
    "open-volume": "see whether the image, volumes/NAME.img below worker.state_dir, is whole: "
    "e2fsck -f -n",
    "limits": "see `worker serve`'s log and this host's control groups",
    "network": "install the package slirp4netns, or choose the network host or none "
    "(of worker-cli: --network)",
    "enter-network": "see whether this host has /dev/net/tun (modprobe tun)",
    "change-directory": "choose a directory that exists inside the job, such as /workspace",
    "place": "stop a job, or raise worker.max_concurrent_jobs",
}
"""The remedy by step, if neither `_SPECIAL` nor `_SHORTAGES` has one for the errno."""
ENOTSUPP = 524
"""An errno of the kernel (linux/errno.h) that the C library does not know."""
_SHORTAGES = {
    ENOTSUPP: "the host's programs have filled net.core.bpf_jit_limit with filters: raise it by "
    "sysctl, or end those with many (Seccomp_filters in /proc/PID/status)",
    errno.EAGAIN: "the launcher, or all jobs together, may have no more processes: raise TasksMax= "
    "of its unit, pids.max of its control group, or the host's kernel.pid_max and "
    "kernel.threads-max, of which jobs have a part (then start the launcher anew)",
    errno.ENOMEM: "the kernel has no memory for it: end something on the host, or run fewer jobs "
    "at a time",
    errno.EMFILE: "raise the launcher's LimitNOFILE=",
    errno.ENFILE: "raise the host's fs.file-max",
}
"""The remedy by errno for a shortage of the host, in any step."""
_DAMAGED = (
    "the image, volumes/NAME.img below worker.state_dir, is cut short or damaged: put a whole copy "
    "back, or try e2fsck -f"
)
_SPECIAL = {
    ("open-volume", errno.ENOSPC): "make room where worker.state_dir is: a reserved volume takes "
    "its whole size again",
    ("open-volume", errno.EINVAL): _DAMAGED,
    ("open-volume", errno.EUCLEAN): _DAMAGED,
    ("open-volume", errno.EBADMSG): _DAMAGED,
    ("open-volume", errno.EIO): _DAMAGED,
    ("open-volume", errno.ELOOP): "volumes/NAME.img below worker.state_dir is a link: put the file "
    "itself there",
    ("open-volume", errno.EPERM): "allow writes to volumes/NAME.img below worker.state_dir: "
    "chattr -i, chattr -a",
    ("open-volume", errno.EROFS): "mount the disk that holds worker.state_dir read-write",
    ("open-volume", errno.EFBIG): "raise the limit on the size of files that the launcher has "
    "(LimitFSIZE=, ulimit -f)",
    ("limits", errno.ENOMEM): "raise the job's memory limit (of worker-cli: --max-memory)",
    ("change-directory", errno.EACCES): "let the job's user into it, or choose another directory",
}
_OF_NO_START = frozenset({"launcher", "request", "reply"})
"""Steps of a refusal that is about the launcher, a whole request or its reply. The request may be
another one than a start."""
_HELD = "see what holds the launcher's processes (ps), and the disk below worker.state_dir"
_WALL_REMEDY = (
    "let the launcher look into its own processes (kernel.yama.ptrace_scope below 3), "
    "or choose the network host or none (of worker-cli: --network)"
)

_VOLUME_FAULTS: dict[int, tuple[type[JobworkerError], str, str]] = {
    errno.ENOENT: (NotFound, "there is no such volume", "see `worker-cli volume list`"),
    errno.EEXIST: (InvalidParams, "it exists", "choose another name, or remove it first"),
    errno.EBUSY: (
        Busy,
        "a live job has it",
        "stop the job, or wait for its end (`worker-cli list --json` has the volumes of each)",
    ),
    CROWDED: (Busy, "several are being made, listed or removed", "try again"),
    errno.EAGAIN: (
        Busy,
        "the system gives the launcher no process for it",
        _SHORTAGES[errno.EAGAIN],
    ),
    errno.ENOMEM: (Busy, os.strerror(errno.ENOMEM), _SHORTAGES[errno.ENOMEM]),
    errno.ENFILE: (Busy, os.strerror(errno.ENFILE), _SHORTAGES[errno.ENFILE]),
    errno.ENOSPC: (
        InvalidParams,
        "the server's disk has no room for it",
        "ask for a smaller one, or make room where worker.state_dir is",
    ),
    errno.EMFILE: (
        Busy,
        "the launcher may open no more descriptors, and each volume of a live job takes one",
        "try again later, or raise the limit (LimitNOFILE=, ulimit -n)",
    ),
    errno.ETOOMANYREFS: (
        Busy,
        "live jobs with volumes keep open files on the disks of too many ended jobs",
        "stop the jobs that keep them, or wait for their end",
    ),
    errno.EOPNOTSUPP: (
        InvalidParams,
        "the server's disk cannot reserve room for it",
        "make it thin (of worker-cli: --thin), or keep worker.state_dir on ext4 or xfs",
    ),
    errno.EPERM: (
        SandboxError,
        "volumes need root's rights",
        "run the service as root",
    ),
}


def explain(refusal: Refusal) -> JobworkerError:
    """The error for a refusal of the launcher.

    The refusal's `step` is a step of a start, or one of "start", "job", "volume" and
    `_OF_NO_START`.
    """
    step, code, detail, more = refusal
    reason = _reason(code) if code else detail
    data: dict[str, object] = {"step": step, "errno": code, "detail": detail}
    if step == "start":
        return SandboxError(
            f"cannot start the job: {detail}",
            remedy=_HELD if code == errno.ETIMEDOUT else "run it again",
            data=data,
        )
    if step == "execute":
        return _explain_execute(code, detail, reason, data)
    if step in _OF_NO_START:
        return _explain_request(step, code, reason, data)
    if step == "job":
        return NotFound(f"cannot reach the job: {detail}", data=data)
    absent = step == "open-volume" and code == errno.ENOENT and "/" not in detail
    if step == "volume" or absent:
        return _explain_volume(code, detail, more, data)
    subject = f" ({shortened(detail)})" if detail and code else ""
    remedy = _SPECIAL.get((step, code)) or _SHORTAGES.get(code) or _REMEDIES.get(step, "")
    if detail == WALL and code == errno.EPERM:
        remedy = _WALL_REMEDY
    return SandboxError(
        f"cannot start the job: the step {step} failed: {reason}{subject}",
        remedy=remedy,
        data=data,
    )


def _explain_request(
    step: str, code: int, reason: str, data: Mapping[str, object]
) -> JobworkerError:
    if step == "reply":
        why = f"the launcher's reply is large, and the launcher cannot send it: {reason}"
        return Busy(f"cannot serve the request: {why}", remedy=_SHORTAGES.get(code, ""), data=data)
    remedy = _SHORTAGES.get(code, "see the launcher's log")
    return SandboxError(f"cannot serve the request: {reason}", remedy=remedy, data=data)


def _reason(code: int) -> str:
    return os.strerror(code) if code != ENOTSUPP else "the kernel has no room for another filter"


def _explain_volume(code: int, name: str, more: str, data: Mapping[str, object]) -> JobworkerError:
    kind, why, remedy = _VOLUME_FAULTS.get(
        code, (SandboxError, os.strerror(code), "see `worker serve`'s log")
    )
    if data["step"] == "open-volume" and code == errno.ENOENT:
        remedy += ", or create it"
    if code == errno.ENOSPC and more:
        why = f"{why}: {more}"
    what = f"use the volume {name}" if name else "list the volumes"
    return kind(f"cannot {what}: {why}", remedy=remedy, data=data)


def _explain_execute(
    code: int, detail: str, reason: str, data: Mapping[str, object]
) -> JobworkerError:
    cannot = f"cannot run {shortened(detail)!r}"
    if code in (errno.ENOENT, errno.ENOTDIR):
        check = "check the spelling"
        if any(map(str.isspace, detail)):
            check = "give program and arguments apart, or a line to a shell: sh -c 'LINE'"
        elif "/" in detail:
            check = "check the path: files of the client's machine are not there"
        return CommandNotFound(
            f"{cannot}: no such program inside the job's root",
            remedy=f"{check}; programs are those of the host's /usr, by name or path",
            data=data,
        )
    if code == errno.E2BIG:
        return TooLarge(f"{cannot}: {reason}", data=data)
    return CommandNotExecutable(
        f"{cannot}: {reason}",
        remedy="name an executable file, or run it through its interpreter",
        data=data,
    )
