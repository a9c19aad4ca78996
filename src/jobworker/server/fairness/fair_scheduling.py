"""Fair queueing between clients: a few tasks of each name pass in each turn of the event loop.

Each connection has its own tasks, and one turn of the event loop runs all tasks that are ready. A
client that opens two hundred connections and sends a request on each would have two hundred
requests served before the first request of any other client.

A request takes several turns of the loop. So the fair scheduler delays waiting tasks while other
clients are active: the next turn of the waiting tasks begins after the loop has become idle and has
then rested for some time. A flood gets a third of the loop at most, and the other clients mostly
find the loop idle. A client that is alone gets all of it.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple
from weakref import WeakValueDictionary

import trio
from attrs import define, field

from jobworker.server.fairness.idle import wait_all_tasks_blocked
from jobworker.threads import in_thread
from jobworker.token_bucket import TokenBucket

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

log = logging.getLogger("jobworker")

RECENT_SECONDS = 0.5
WAITING_SECONDS = 5.0
"""The longest time for which a client that waits for an answer counts as active."""
BURST_SECONDS = 0.5
"""The burst of a name's token bucket: what its rate allows in this time may pass at once."""
REST = 2
"""The length of a rest as a multiple of the turn before it. The turn includes all work that it has
started. So a flood gets one third of the loop."""
MAX_REST_SECONDS = 0.01
"""The longest rest, since a turn may be long for another reason, such as a busy host. Also the
longest wait for the loop to become idle before a rest."""
MAX_LONG_REST_SECONDS = 2.0
LONG_WORK_BURST_SECONDS, LONG_WORK_SHARE = 0.1, 0.05
"""The token bucket of each name for long work: its capacity in seconds of processor time, and its
refill in seconds of processor time per second. Work that begins while the bucket is in credit runs
to its end, and may overdraw it. Further work of that name then waits in line."""
MAX_LONG_WORK_THREADS = 20
"""The most threads that do long work at a time, so that no flood takes the threads that jobs need.
Each of the largest requests needs a slot (`slots`), so they leave most of these threads to others.
"""


@define(eq=False)
class ActiveClients:
    """Which clients are active: they connected or sent something a moment ago, or wait for a reply.

    A client that waits for the start of its job, or for the end of a short job, needs the processor
    as much as a client that sends a request: if a flood had all of it meanwhile, the client would
    only wait longer. But a client that waits for hours is not active all that time.
    """

    _until: dict[str, float] = field(factory=dict, init=False)
    _came: dict[tuple[str, str], float] = field(factory=dict, init=False)
    """Until when a new client counts as active, by its name and by the line that let it in."""
    _served: Counter[str] = field(factory=Counter, init=False)
    """How many requests of each name are being served."""

    def mark_active(self, name: str) -> None:
        """Record that this client has sent a request or a part of one."""
        self._extend(name, RECENT_SECONDS)

    def came(self, name: str, line: str) -> None:
        """Record that this client has connected through that line, and will soon send a request.

        Until it sends one, the client does not count as another client for the line that let it in.
        Otherwise a flood of connections would make its own line rest, and an honest client in the
        same line would wait three times as long.
        """
        self._came[name, line] = trio.current_time() + RECENT_SECONDS

    @contextmanager
    def serving(self, name: str) -> Iterator[None]:
        """Count the client as active while its request is served in the block."""
        self._served[name] += 1
        self._extend(name, WAITING_SECONDS)
        try:
            yield
        finally:
            self._served[name] -= 1
            if not self._served[name]:
                del self._served[name]
                self._until[name] = trio.current_time() + RECENT_SECONDS

    def _extend(self, name: str, seconds: float) -> None:
        self._until[name] = max(self._until.get(name, 0.0), trio.current_time() + seconds)

    def has_others(self, than: Container[str]) -> bool:
        """Whether a client is active whose name is not in `than`."""
        now = trio.current_time()
        for name in [name for name, until in self._until.items() if until < now]:
            del self._until[name]
        for key in [key for key, until in self._came.items() if until < now]:
            del self._came[key]
        let_in = {name for name, line in self._came if line in than}
        came = (name for name, _ in self._came if name not in let_in)
        return any(name not in than for name in (*self._until, *came))

    async def rest_after(
        self, began: float, than: Container[str] = (), most_seconds: float = MAX_REST_SECONDS
    ) -> None:
        """Leave the event loop idle after work, if a client is active whose name is not in `than`.

        First wait until all tasks that the work has started are blocked, for at most
        `most_seconds`. This time counts as work. Then sleep for `REST` times the time since
        `began`, again for at most `most_seconds`.
        """
        if self.has_others(than):
            with trio.move_on_after(most_seconds):
                await wait_all_tasks_blocked()
            worked = trio.current_time() - began
            await trio.sleep(min(REST * worked, most_seconds))


@define(eq=False)
class FairThreadPool:
    """Runs long work in threads, one piece at a time for each client's name.

    Threads compete with the event loop. So each name has a token bucket of thread time, its
    account. While the account is in credit, work of that name begins at once, beside the work of
    others. If the account is overdrawn, the work waits in one line for all such names. One piece of
    work from this line runs at a time, and then the line rests. This work is not charged to the
    account.
    """

    _active_clients: ActiveClients
    _lines: WeakValueDictionary[str, trio.StrictFIFOLock] = field(
        factory=WeakValueDictionary, init=False
    )
    """One lock for each name that has work."""
    _lock: trio.StrictFIFOLock = field(factory=trio.StrictFIFOLock, init=False)
    _rests_until: float = field(default=-math.inf, init=False)
    _accounts: dict[str, TokenBucket] = field(factory=dict, init=False)
    """The accounts of names that have used thread time lately, in seconds."""
    _threads: trio.CapacityLimiter = field(
        factory=lambda: trio.CapacityLimiter(MAX_LONG_WORK_THREADS), init=False
    )

    async def run(self, name: str, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Run `work` in a thread for a client of that name, and return its result.

        Waits until earlier work of the name has ended, and in line if its account is overdrawn.
        """
        async with self._lines.setdefault(name, trio.StrictFIFOLock()):
            account = self._accounts.get(name)
            if account is None or not account.is_overdrawn(trio.current_time()):
                return await self._run_on_account(name, work, *arguments)
            async with self._lock:
                await trio.sleep_until(self._rests_until)
                began = trio.current_time()
                try:
                    return await in_thread(work, *arguments, limiter=self._threads)
                finally:
                    now = trio.current_time()
                    if self._active_clients.has_others((name,)):
                        self._rests_until = now + min(REST * (now - began), MAX_LONG_REST_SECONDS)

    async def _run_on_account(
        self, name: str, work: Callable[[*Arguments], T], *arguments: *Arguments
    ) -> T:
        spent = 0.0

        def timed() -> T:
            nonlocal spent
            began = time.thread_time()  # wall time would include other threads' work
            try:
                return work(*arguments)
            finally:
                spent = time.thread_time() - began

        try:
            return await in_thread(timed, limiter=self._threads)
        finally:
            now = trio.current_time()
            for rested in [who for who, one in self._accounts.items() if one.is_full(now)]:
                del self._accounts[rested]
            new = TokenBucket(now, LONG_WORK_BURST_SECONDS, LONG_WORK_SHARE)
            self._accounts.setdefault(name, new).draw(now, spent)


@define(eq=False)
class FairScheduler:
    """Lets tasks pass in turns; keeps those that do not fit into this turn for the next one."""

    _most: int
    """The cost that may pass in one turn, in the unit of the costs that `wait_turn` gets. The names
    share it equally, but one task of each name may always pass."""
    _active_clients: ActiveClients
    _most_seconds: float = MAX_REST_SECONDS
    """The longest rest."""
    _rate: float = math.inf
    """The cost per second that each name may pass in the long run, while others are active."""
    _alone: int = 1
    """The factor of `_most` for turns that begin while no other client is active."""
    _most_now: int = field(default=0, init=False)
    """The cost that may pass in this turn."""
    _accounts: dict[str, TokenBucket] = field(factory=dict, init=False)
    _passed: Counter[str] = field(factory=Counter, init=False)
    _waiting: dict[str, dict[trio.lowlevel.Task, int]] = field(factory=dict, init=False)
    """The waiting tasks of each name, oldest first, with their costs."""
    _began: float | None = field(default=None, init=False)
    """When this turn began; None if no task has passed since the last turn."""
    _keeper: trio.lowlevel.Task | None = field(default=None, init=False)

    async def wait_turn(self, name: str, cost: int = 1) -> None:
        """Wait until a task of this name may pass; `cost` is its part of what passes in a turn.

        If there is room in this turn, it returns at once, without a checkpoint. A name that is over
        its rate first sleeps until its token bucket is no longer overdrawn, while others are
        active. A task that is cancelled while it waits is not charged.
        """
        account = self._charge(name, cost)
        try:
            if account is not None and (seconds := account.seconds_overdrawn(trio.current_time())):
                await trio.sleep(seconds)
            if self._began is None:
                self._look_about((name,))
            if self._passed[name] < self._part() and name not in self._waiting:
                self._passed[name] += cost
                self._count()
            else:
                await self._wait(name, cost)
        except trio.Cancelled:  # it does not pass; else a client that comes and goes owes for hours
            if account is not None:
                account.draw(trio.current_time(), -cost)
            raise

    async def _wait(self, name: str, cost: int) -> None:
        task, line = trio.lowlevel.current_task(), self._waiting.setdefault(name, {})
        line[task] = cost
        self._count()

        def leave(_: object) -> trio.lowlevel.Abort:
            del line[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(leave)

    def _charge(self, name: str, cost: int) -> TokenBucket | None:
        """Charge a cost to a name's account, and return it; None if the name has no rate now."""
        if self._rate == math.inf:
            return None
        now = trio.current_time()
        account = self._accounts.get(name)
        if account is None:
            for rested in [who for who, one in self._accounts.items() if one.is_full(now)]:
                del self._accounts[rested]
            account = self._accounts[name] = TokenBucket(
                now, self._rate * BURST_SECONDS, self._rate
            )
        if not account.take(now, cost):
            if not self._active_clients.has_others((name,)):
                return None
            account.draw(now, cost)
        return account

    def _part(self) -> int:
        return max(1, self._most_now // max(1, len(self._waiting)))

    def _look_about(self, than: Container[str]) -> None:
        self._most_now = self._most
        if self._alone > 1 and not self._active_clients.has_others(than):
            self._most_now *= self._alone

    def _count(self) -> None:
        if self._began is None:
            self._began = trio.current_time()
            if self._keeper is None:
                self._keeper = trio.lowlevel.spawn_system_task(self._keep)
            else:
                trio.lowlevel.reschedule(self._keeper)

    async def _keep(self) -> None:
        """Begin one turn after the other, for as long as tasks pass."""
        while True:
            while self._began is not None:
                await trio.lowlevel.checkpoint()
                try:
                    if self._waiting:
                        await self._active_clients.rest_after(
                            self._began, self._waiting, self._most_seconds
                        )
                    self._begin()
                except Exception:  # an exception here would end the whole event loop
                    log.exception("an internal fault between two turns")
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)

    def _begin(self) -> None:
        self._passed.clear()
        self._look_about(self._waiting)
        part = self._part()
        for name, line in tuple(self._waiting.items()):
            while line and self._passed[name] < part:
                task = next(iter(line))
                self._passed[name] += line.pop(task)
                trio.lowlevel.reschedule(task)
            if not line:
                del self._waiting[name]
        self._began = trio.current_time() if self._passed else None
