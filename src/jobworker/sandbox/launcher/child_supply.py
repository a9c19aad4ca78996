"""Gives each start a child: a spare, one that is being made as a spare, or one made for the start.

It also keeps spares ready. The fork server makes the children. Between the request for a child and
its clone, the child has its slot and its job but no process.

What must hold: nothing here waits for the fork server.

Standard library only.
"""

from functools import partial

from jobworker.errors import JobworkerError
from jobworker.sandbox import channel
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.launcher.child import Child, ChildExit, PendingStart
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.ends import Ends
from jobworker.sandbox.launcher.jobs import Jobs
from jobworker.sandbox.launcher.orders import Orders
from jobworker.sandbox.launcher.reports import GIVEN_UP, fault, problem
from jobworker.sandbox.launcher.spares import Spares
from jobworker.sandbox.launcher.start_replies import StartReplies
from jobworker.sandbox.log import log_line
from jobworker.sandbox.protocol.operations import SPAWN
from jobworker.sandbox.start.plan import Order, fits_spare

REFILL_SECONDS = 0.02
"""The delay between the use of a spare and the making of the next one.

To make it at once would slow down the start that has taken the spare."""


class ChildSupply:
    """Has children made, for starts and as spares."""

    def __init__(
        self,
        pool: ChildPool,
        jobs: Jobs,
        spares: Spares,
        orders: Orders,
        ends: Ends,
        replies: StartReplies,
    ) -> None:
        self._event_loop, self._pool, self._jobs = pool.event_loop, pool, jobs
        self._spares, self._orders, self._ends = spares, orders, ends
        self._replies = replies
        self._event_loop.call_later(0, self._refill)

    def close(self) -> None:
        """Make no spare any more."""
        self._spares.wanted = 0
        self._event_loop.cancel(self._refill)

    def must_wait(self, order: Order) -> bool:
        """Whether a start has to wait for a slot: none is free, but an ended child will free one.

        A start that can use a spare needs no free slot.
        """
        if self._pool.has_room():
            return False
        is_usual = fits_spare(order, self._pool.usual_disk_bytes)
        if is_usual and self._spares.are_left:
            return False
        return any(child.doomed for child in self._jobs.children)

    def give(self, start: PendingStart) -> bool:
        """Give a start its child. Returns False if it has to wait for a slot after all.

        Raises OSError or JobworkerError if no child can be asked for.
        """
        order = start.request.order
        if not self._event_loop.is_scheduled(self._refill):
            self._event_loop.call_later(REFILL_SECONDS, self._refill)
        if not fits_spare(order, self._pool.usual_disk_bytes):
            self._make(order, start)
            return True
        while (spare := self._spares.take(order.hostname)) is not None:
            if self._use(spare, start):
                return True
        spare = self._spares.take_unmade()
        if spare is not None:
            self._jobs.become(spare, start)
            spare.start = start
        elif self.must_wait(order):  # for the slots of the spares that were killed above
            return False
        else:
            self._make(None, start)
        return True

    def _use(self, spare: Child, start: PendingStart) -> bool:
        """Let a spare become the job of a start. Returns False if the spare is no good."""
        if spare.root is not None and disk_images.lost_writes(spare.root):
            self._jobs.kill(spare)
            return False
        if spare.has_ended():
            log_line("a spare is lost: it has ended while it waited")
            return False
        try:
            self._orders.give(spare, start)
        except OSError as error:
            log_line(f"a spare is lost: {error}")
            return False
        self._jobs.become(spare, start)
        return True

    def _refill(self) -> None:
        """Ask for one spare, if more are wanted. `_on_made` asks for the next one."""
        if not self._spares.needs_another or not self._pool.has_room():
            return
        try:
            self._spares.begin(self._make(None))
        except (OSError, JobworkerError) as error:
            log_line(f"cannot keep a spare: {error}")

    def _make(self, order: Order | None, start: PendingStart | None = None) -> Child:
        """Ask the fork server for a child, for a start or as a spare."""
        child = self._pool.make(order, self._on_made)
        self._jobs.add(child)
        if start is not None:
            self._jobs.become(child, start)
            child.start = start
        return child

    def _on_made(self, child: Child, failure: channel.Message | None) -> None:
        """Handle the fork server's answer: the child has a process, or none could be made."""
        start, child.start = child.start, None
        is_spare = self._spares.end_making(child)
        if failure is not None and child.pidfd < 0:
            self._end_unmade(child, failure)
            return
        child.failure = child.failure or failure  # an earlier try of this call may have raised
        child.doomed = child.doomed or failure is not None
        try:
            self._ends.watch(child)
        except OSError as error:  # epoll(7) has no memory, or its limit on watches is reached
            child.failure = child.failure or problem(SPAWN.step, error)
            child.doomed = True
            self._ends.look_for(child)
        if child.doomed:  # its start was given up, or the job removed, before it had a process
            if child.request is not None:
                child.failure = child.failure or GIVEN_UP
            self._jobs.kill(child)
        elif start is not None:
            self._order_new(child, start)
        elif is_spare:
            self._spares.add(child)
            self._event_loop.call_later(0, self._refill)

    def _order_new(self, child: Child, start: PendingStart) -> None:
        """Give the order to a child that was made for this start."""
        try:
            self._orders.give(child, start)
        except (OSError, JobworkerError) as error:
            child.failure = child.failure or problem(SPAWN.step, error)
        except Exception:  # noqa: BLE001 - recorded; without a reply the service waits for ever
            child.failure = fault(self._event_loop.record("Spawn"))

    def _end_unmade(self, child: Child, why: channel.Message) -> None:
        """Fail the start of a child that could not be made, and free its slot."""
        child.exit, child.doomed, child.end_is_taken = ChildExit(None, None), True, True
        child.failure = child.failure or {"step": SPAWN.step, **why}
        if child.request is not None:
            self._replies.fail_when_cleared(child)
        elif child.job is None:
            # The next start tries again, and its reply has the reason if it fails too.
            log_line(f"cannot keep a spare: {why}")
        self._jobs.forget(child)
        self._event_loop.call_with_retries(partial(self._ends.clear, child))
