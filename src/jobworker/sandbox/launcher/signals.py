"""Sends signals to a job's first process, and keeps the reason why they were sent.

Standard library only.
"""

import contextlib
import errno
import os
import signal
import time

from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.protocol.end_requests import EndRequest, EndRequestLog

_HEEDED = (b"SigBlk:", b"SigIgn:", b"SigCgt:")


def keep_end_request(
    child: Child, ask: EndRequest | None, number: int, *, at_once: bool = False
) -> None:
    """Record the end that was asked for a live job and the signal, for the next service.

    `at_once`: no grace period is left, so the next service has to kill the job at once.
    """
    if ask is None or child.exit is not None:
        return
    if at_once:
        ask = ask._replace(kill_in_ms=0)
    now = time.monotonic()
    if child.asked is None:
        child.asked = EndRequestLog(ask, now)
    child.asked.add(ask, number, now)


def deliver(child: Child, number: int) -> bool:
    """Send a signal to a job's first process. Returns False if that could have no effect.

    The kernel does not deliver a signal without a handler to PID 1 of a namespace
    (pid_namespaces(7)), although the default action would end another process. So the masks in
    /proc/PID/status decide (proc(5)). A process that catches the signal gets it. A process that
    ignores it does so on purpose, and keeps its grace period. A process that blocks it may read it
    from a signalfd(2). The init of `--init` waits for all signals by sigwaitinfo(2), which no mask
    shows, and passes them on. If the masks cannot be read, the signal is sent: a stop must not fail
    for want of a descriptor.

    Raises ProcessLookupError if the job has ended, since its pid may belong to another process.
    """
    if child.exit is not None:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    if child.pidfd < 0:  # the job has no process yet
        return False
    if child.report < 0 and number not in (signal.SIGKILL, signal.SIGSTOP):
        # Read as bytes: the first line has the process's name, which may be no valid text.
        with contextlib.suppress(OSError), open(f"/proc/{child.pid}/status", "rb") as status:
            masks = [line.split()[1] for line in status if line.startswith(_HEEDED)]
            if not any(int(mask, 16) >> (number - 1) & 1 for mask in masks):
                return False
    signal.pidfd_send_signal(child.pidfd, number)
    return True
