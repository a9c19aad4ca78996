"""Signals to a job's first process, and why they were sent.

Standard library only.
"""

import contextlib
import errno
import os
import signal
import time

from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.protocol.asks import Ask, Asked

_HEEDED = (b"SigBlk:", b"SigIgn:", b"SigCgt:")


def keep_ask(child: Child, ask: Ask | None, number: int, *, at_once: bool = False) -> None:
    """Keep why a live job was sent a signal; `at_once` where only its kill is left to be done."""
    if ask is None or child.exit is not None:
        return
    if at_once:
        ask = ask._replace(kill_in_ms=0)
    now = time.monotonic()
    if child.asked is None:
        child.asked = Asked(ask, now)
    child.asked.add(ask, number, now)


def deliver(child: Child, number: int) -> bool:
    """Send a signal to a job's first process; False if that would have no effect of any kind.

    Raises ProcessLookupError for a job that has ended: its process id may be another's by now.

    PID 1 of a namespace is spared every signal that it has no handler for
    (pid_namespaces(7)), where another process would end by the signal's default action. One
    that ignores the signal on purpose has said something, and gets its grace period; one that
    blocks it may be told of it otherwise (signalfd(2)). The masks in proc(5) tell. An init of ours
    waits for all signals (sigwaitinfo(2), which no mask shows) and passes them on. Where the masks
    cannot be read, the signal is sent: a stop is not refused for want of a descriptor.
    """
    if child.exit is not None:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    if child.pidfd < 0:  # it has no process yet
        return False
    if child.report < 0 and number not in (signal.SIGKILL, signal.SIGSTOP):
        # As bytes: the first line is the process's name, which may be any.
        with contextlib.suppress(OSError), open(f"/proc/{child.pid}/status", "rb") as status:
            masks = [line.split()[1] for line in status if line.startswith(_HEEDED)]
            if not any(int(mask, 16) >> (number - 1) & 1 for mask in masks):
                return False
    signal.pidfd_send_signal(child.pidfd, number)
    return True
