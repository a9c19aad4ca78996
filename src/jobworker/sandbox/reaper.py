"""The thread that reaps ended processes, so that the launcher's own thread never waits for it.

When a process is reaped by waitid(2), the kernel drops the entries of every /proc for it: 4 to 9 µs
for each name that somebody has looked up below /proc/PID. A job's memory limit bounds these names,
at several hundred thousand.

Only a thread of the parent can reap a process, so another process cannot do this. The thread ends
when it has reaped what it was given. While it runs, this process must make no copies of itself: a
copy has one thread, and what another thread had locked stays locked in it (`is_running`).

Standard library only.
"""

import _thread
import contextlib
import os
from collections.abc import Sequence
from types import SimpleNamespace

_NONE, _BEGINS = -1, 0
_reaper = SimpleNamespace(tid=_NONE)
"""The kernel's id of the last thread: gettid(2)."""


def start(pidfds: Sequence[int]) -> bool:
    """Reap these processes and close the pidfds, which belong to the thread from then on.

    Returns False, and takes none of them, while the thread is still busy or if the kernel makes no
    thread now.
    """
    if is_running():
        return False
    _reaper.tid = _BEGINS
    try:
        _thread.start_new_thread(_reap, (pidfds,))
    except RuntimeError:  # EAGAIN of pthread_create(3)
        _reaper.tid = _NONE
        return False
    return True


def is_running() -> bool:
    """Whether the kernel has the thread, or is about to have it."""
    tid = _reaper.tid
    return tid == _BEGINS or (tid != _NONE and os.path.exists(f"/proc/self/task/{tid}"))


def _reap(pidfds: Sequence[int]) -> None:
    _reaper.tid = _thread.get_native_id()
    for pidfd in pidfds:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
