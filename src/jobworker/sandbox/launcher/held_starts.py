"""Holds a start, so that the launcher can find out for certain whether its program runs.

If the launcher gives up a start, the service may start the job again. So the launcher must know
that the program has not run. The child's socket shows it, because execve(2) closes the socket. But
to read the socket and then kill the child is a race: an execve may complete in between. So the
launcher stops the child first:

    SIGSTOP      pending at once; from here on the program executes no instruction
    read         if the socket is closed, the program was executed before: it goes on (SIGCONT)
    SIGKILL      if an execve completes after the read, the program still executes no instruction

The kernel delivers a pending signal before it returns to user space, also from execve(2), which
keeps pending signals. A process can neither catch nor block these two signals, even as PID 1 of a
namespace below the launcher's (pid_namespaces(7)). So the launcher does not wait until the child
has stopped.

With an init, a child of the init executes the program, and the signal does not reach that child.
Such a start is held for certain only if the init itself has not been executed yet.

Standard library only.
"""

import contextlib
import signal

from jobworker.sandbox.fork_server import NAME
from jobworker.sandbox.launcher.child import Child


def hold(child: Child) -> bool:
    """Stop a child that has not ended. Returns True if its program certainly cannot begin now."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGSTOP)
    return child.report < 0 or _has_executed_nothing(child)


def go_on(child: Child) -> None:
    """Let a child that `hold` has stopped go on."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(child.pidfd, signal.SIGCONT)


def _has_executed_nothing(child: Child) -> bool:
    """Whether a child still has the fork server's name, which execve(2) would have changed.

    Returns False if the name cannot be read.
    """
    try:
        with open(f"/proc/{child.pid}/comm", encoding="utf-8", errors="replace") as name:
            return name.read().strip() == NAME
    except OSError:
        return False
