"""Takes the end of each child: reads how it ended, reports that, and releases what it held.

The event of a job's end names the writes that the job lost (`disk.images.lost_writes`). For the
job's own disk the launcher knows this at once. A volume is first written out by a process of its
own, so the event waits until such a process was available and has finished.

An end has two halves. The launcher releases what a job held (disk, mounts, scope, range of ids,
scratch) as soon as the job has ended, whether or not a service is connected. It keeps the exit
status and the pipes until the service asks to remove the job (`launcher.jobs`).

What must hold: a child is cleared away only after its exit status was read.

Standard library only.
"""

import os
import signal
import time
from collections.abc import Callable
from functools import partial

from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.launcher.child import Child, status_of
from jobworker.sandbox.launcher.child_messages import ChildMessages
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.oom_watch import OomWatch
from jobworker.sandbox.launcher.reports import DIED, Tell, how_ended, measured, since_end
from jobworker.sandbox.launcher.volume_losses import VolumeLosses
from jobworker.sandbox.launcher.walls import Walls
from jobworker.sandbox.launcher.zombies import Zombies
from jobworker.sandbox.log import log_line
from jobworker.sandbox.network import gateway
from jobworker.sandbox.protocol import events

LOOK_AGAIN_SECONDS = 0.1
"""The pause before the launcher checks again for an end that it cannot watch or read yet."""
TOGETHER_SECONDS = 0.1
"""If a whole control group is killed, a job and its gateway end at most this far apart."""


class Ends:
    """Watches children and takes their ends.

    `on_start_failed` is called for each child that ends before its program was executed, and
    `on_slot_free` when a child is cleared away.
    """

    def __init__(
        self,
        pool: ChildPool,
        jobs: Jobs,
        messages: ChildMessages,
        walls: Walls,
        tell: Tell,
        on_start_failed: Callable[[Child], None],
        on_slot_free: Callable[[], None],
    ) -> None:
        self._event_loop, self._pool, self._jobs = pool.event_loop, pool, jobs
        self._messages, self._walls, self._tell = messages, walls, tell
        self._on_start_failed, self._on_slot_free = on_start_failed, on_slot_free
        self._zombies = Zombies(pool.event_loop)
        self._losses = VolumeLosses(pool, self._tell_end)
        self._oom_watch = OomWatch(pool.event_loop, jobs.kill)

    def watch(self, child: Child) -> None:
        """Watch a child's end, its messages, its gateway and its OOM events. Raises OSError."""
        assert child.sock is not None
        self._event_loop.watch(child.pidfd, partial(self._on_exit, child))
        if child.gateway is not None:
            self._event_loop.watch(child.gateway, partial(self._on_gateway_exit, child))
        self._event_loop.watch(child.sock.fileno(), partial(self._messages.read, child))
        self._oom_watch.watch(child)

    def look_for(self, child: Child) -> None:
        """Check without waiting for the ends of a child and its gateway that epoll does not watch.

        Repeats itself every `LOOK_AGAIN_SECONDS` until both have ended.
        """
        unwatched = False
        for pidfd, on_end in (
            (child.gateway, self._on_gateway_exit),
            (child.pidfd if child.exit is None else None, self._on_exit),
        ):
            if pidfd is None or self._event_loop.watches(pidfd):
                continue
            if os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                unwatched = True
            else:
                on_end(child)
        if unwatched:
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, partial(self.look_for, child))

    def _on_exit(self, child: Child) -> None:
        how = status_of(child)
        self._event_loop.unwatch(child.pidfd)
        if how is None:
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, partial(self.look_for, child))
            return
        child.exit, child.ended_at, child.doomed = how, time.monotonic(), True
        self._zombies.add(child.pidfd)
        self._event_loop.call_with_retries(partial(self._take, child))

    def _take(self, child: Child) -> None:
        """Read an ended child's last messages, report its end, and release what it held."""
        child.final_want = child.want()
        try:
            child.final_usage = child.usage()
        except OSError as error:
            log_line(f"cannot read what {child.slot.name} has used: {error}")
        if child.gateway is not None:
            signal.pidfd_send_signal(child.gateway, signal.SIGKILL)
        if child.sock is not None:  # its last messages were sent before it ended
            self._messages.read(child)
        if child.request is not None:
            self._on_start_failed(child)
        elif child.job is None:
            is_spare = child.order >= 0  # it has no order
            if is_spare and child.failure and not (child.was_killed and child.failure is DIED):
                log_line(f"a spare failed: {child.failure}")
            self._jobs.forget(child)
        else:
            if child.root is not None and disk_images.lost_writes(child.root):
                child.lost = [""]
            self._losses.find(child)
        child.end_is_taken = True
        self._event_loop.call_with_retries(partial(self.clear, child))

    def _tell_end(self, child: Child) -> None:
        child.end_is_known = True
        if child.job is not None:
            ended = events.JobEnded(child.job, since_end(child), how_ended(child), *measured(child))
            self._tell(events.message_of(ended), ())

    def _on_gateway_exit(self, child: Child) -> None:
        assert child.gateway is not None
        self._event_loop.unwatch(child.gateway)
        how = gateway.reap(child.gateway)
        if how is None:
            self._event_loop.call_later(LOOK_AGAIN_SECONDS, partial(self.look_for, child))
            return
        child.gateway = None
        if child.exit is None:
            self._event_loop.call_later(TOGETHER_SECONDS, partial(self._walls.tell_end, child, how))
        if child.exit is not None:
            self._event_loop.call_with_retries(partial(self.clear, child))

    # --- clearing away ----------------------------------------------------------------------

    def clear(self, child: Child) -> None:
        """Release what an ended child held; its scope follows when the kernel no longer uses it."""
        if child not in self._jobs.children or not child.end_is_taken or child.is_clearing:
            return
        self._oom_watch.forget(child)
        if child.gateway is None:  # else this is called again when the gateway has ended
            self._pool.clear(child, partial(self._on_cleared, child))
            child.is_clearing = True
        self._pool.discard_disk(child)

    def _on_cleared(self, child: Child) -> None:
        self._jobs.discard(child)  # its slot is free, even if a step below fails
        if not child.inspected:
            self._event_loop.call_with_retries(partial(self._pool.release_volumes, child))
        self._event_loop.call_with_retries(partial(self._jobs.tell_cleared, child))
        self._event_loop.call_with_retries(self._on_slot_free)
