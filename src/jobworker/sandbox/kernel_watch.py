"""Ends a job that holds more kernel memory than it may of what no control group counts.

Measuring that takes a process a while (`sandbox.kernel_memory`), so it is done only when there is a
reason: the kernel's memory that cannot be given back, which one line of /proc/meminfo tells for the
whole host, has grown. Who holds more than `BOUND_BYTES` then is ended as out of memory.

What must hold: a job holds no more of such memory than the bound, what the host's grows by before
it is looked at, and what the job can add meanwhile. Looking costs an idle launcher nothing.

Standard library only.
"""

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial

from jobworker.sandbox import channel, kernel_memory
from jobworker.sandbox import syscalls as sc
from jobworker.sandbox.announce import say
from jobworker.sandbox.children import Child
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.turns import Turns

BOUND_BYTES = 64 << 20
STEP_BYTES = 32 << 20
"""Growth of the host's that is a reason to look."""
LOOK_SECONDS = 0.2
SELDOM_SECONDS = 30.0
"""Looked at in any case this often: what others give back may hide what a job takes."""
_FIELD = b"SUnreclaim:"


class KernelWatch:
    """Looks at the host's number, and where that grows at each job."""

    def __init__(
        self,
        turns: Turns,
        chores: Chores,
        running: Callable[[], dict[int, Child]],
        kill: Callable[[Child], None],
    ) -> None:
        self._turns, self._chores = turns, chores
        self._running, self._kill = running, kill
        self._meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        self._calm = self._unreclaimable()
        self._measuring = False
        self._measured_at = time.monotonic()

    def wake(self) -> None:
        """A job runs: look from now on, until none does."""
        if not self._turns.is_set(self._look):
            self._calm = min(self._calm, self._unreclaimable())
            self._turns.call_in(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        running = self._running()
        if not running:
            return
        self._turns.call_in(LOOK_SECONDS, self._look)
        now = self._unreclaimable()
        self._calm = min(self._calm, now)
        overdue = time.monotonic() > self._measured_at + SELDOM_SECONDS
        if self._measuring or not (overdue or now > self._calm + STEP_BYTES):
            return
        pids = {child.pid: job for job, child in running.items()}
        try:
            self._chores.start(partial(_measure, pids), self._judge)
        except OSError:
            return  # no process to be had: at the next look, then
        self._measuring, self._calm, self._measured_at = True, now, time.monotonic()

    def _judge(self, outcome: channel.Message) -> None:
        self._measuring = False
        if "errno" in outcome:
            say(f"cannot measure jobs' kernel memory: {outcome}")
        held = outcome.get("held", [])
        assert isinstance(held, list)
        running = self._running()
        for job, count in held:
            child = running.get(job)
            if child is not None and count > BOUND_BYTES:
                say(f"job {job} is ended: it holds {count >> 20} MiB of uncounted kernel memory")
                child.hoards = True
                self._kill(child)

    def _unreclaimable(self) -> int:
        text = os.pread(self._meminfo, 8192, 0)
        at = text.find(_FIELD)
        return int(text[at + len(_FIELD) :].split(maxsplit=1)[0]) << 10 if at >= 0 else 0


def _measure(first_processes: dict[int, int]) -> channel.Message:
    """In a process: with a /proc of its own, which goes with it.

    What is looked up in the launcher's, the launcher would have to forget when it collects the job.
    """
    with contextlib.suppress(OSError):  # a kernel that lets no ordinary user do it: slower, then
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount("proc", "/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
    return {"held": list(kernel_memory.measure(first_processes).items())}
