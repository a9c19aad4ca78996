"""The start of one job by the launcher: tried again, given up, or left to the next service.

PENDING ─► RUNNING ─► asked ─┬► started
   ▲                         ├► failed: the job ends
   └── lacks something, or ◄─┤
       was given up          └► this service ends: the next one learns what became of it
"""

import logging
import math
from contextlib import suppress

import trio
from attrs import define, evolve, field

from jobworker.errors import JobworkerError, LauncherGone
from jobworker.jobs.ending import Ending
from jobworker.jobs.live_record import LiveRecord
from jobworker.jobs.orders import limits_of, order_of
from jobworker.jobs.secrets import Secrets
from jobworker.jobs.start_failures import has_not_run, may_pass, undecided
from jobworker.model.job import JobRecord
from jobworker.model.lifecycle import Event, Reason, State
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.service.job_ends import Exits, Started
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.sandbox.start.plan import Order

log = logging.getLogger("jobworker.jobs")

START_AGAIN_SECONDS = 1.0
"""The pause before another attempt to start a job that service or launcher could not start."""
LOG_AGAIN_SECONDS = 60.0
"""How often the log says that such a job still waits."""
START_PATIENCE_SECONDS = 1.0
"""How long a start may go on after a stop or the end of the service. Most starts take less."""


@define(eq=False, kw_only=True)
class Starting:
    """The start of one job, with what may end it early."""

    _live_record: LiveRecord
    _launcher: LauncherClient
    _ending: Ending
    _is_tried_once: bool
    """Whether a start that fails ends the job, even if it might succeed later: a client waits."""
    secrets: Secrets = field(factory=Secrets, repr=False)
    """The values of secret variables, which the record masks. They are never on the disk."""
    waits_for_the_next: bool = field(default=False, init=False)
    """Whether the job, if it has not started, is left to the next service."""
    is_left: bool = field(default=False, init=False)
    """Whether this service ends and does not wait for the start any more."""
    error: JobworkerError | None = field(default=None, init=False)
    """Why the program was not started."""
    _unwanted: trio.Event = field(factory=trio.Event, init=False)
    """Set once the start may be given up: the job is to end, or the service ends."""
    _logged_at: float = field(default=-math.inf, init=False)

    def give_up(self) -> None:
        """Have the launcher give up a start that is under way, after `START_PATIENCE_SECONDS`."""
        self._unwanted.set()

    async def run(self) -> tuple[Started, Exits] | JobRecord | None:
        """Have the launcher start the job.

        Returns what the launcher tells of the started job; or the record of its end if it is not to
        run; or None if it is left to the next service. If service or launcher lacks something at
        the moment, the job waits and is tried again.
        """
        while True:
            if self._live_record.record.state is State.PENDING:
                if self._ending.stopping:
                    return self._live_record.advanced(Event.STOP)
                if self.waits_for_the_next:
                    return None
                self._live_record.record = self._live_record.advanced(Event.ADMIT)
                await self._live_record.store()
            try:
                begun = await self._spawn()
            except JobworkerError as error:
                pause = START_AGAIN_SECONDS
                if has_not_run(error):
                    pause = 0.0
                elif self.is_left:  # the next service will see whether the job was started
                    self.error = undecided(self._live_record.record.id)
                    if self._ending.stopping:
                        await self._live_record.store()
                    return None
                elif self._is_tried_once or not may_pass(error):
                    return self._failed(error)
                else:
                    self._log(error)
            else:
                self.secrets.drop()
                self._live_record.shorten()
                self._live_record.record = self._live_record.started()
                return begun
            # Its program has not run, so the job is PENDING again, also for the next service.
            self._live_record.record = evolve(self._live_record.record, state=State.PENDING)
            await self._live_record.store()
            if pause:
                await trio.sleep(pause)

    async def _spawn(self) -> tuple[Started, Exits]:
        """Have the launcher start the job, or give the start up once it is `_unwanted`."""
        job, spec = self._live_record.record.id, await self._live_record.whole_spec()
        order = order_of(spec, job, await self.secrets.values())
        return await self._ask(order, limits_of(spec))

    async def _ask(self, order: Order, limits: ScopeLimits) -> tuple[Started, Exits]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_unwanted)
            try:
                return await self._launcher.spawn(self._live_record.record.id, order, limits)
            except JobworkerError as error:
                failure = error
            finally:
                nursery.cancel_scope.cancel()
        try:
            raise failure
        finally:
            del failure  # its traceback has this frame: together they would be a cycle

    async def _give_up_unwanted(self) -> None:
        await self._unwanted.wait()
        await trio.sleep(START_PATIENCE_SECONDS)
        with suppress(JobworkerError):
            await self._launcher.give_up_start(self._live_record.record.id)

    def _failed(self, error: JobworkerError) -> JobRecord:
        """Keep why the job was not started. Returns the record of its end."""
        # The frames of its traceback hold the job and the values of secret variables: they would be
        # a cycle, which Python collects seldom.
        error.__traceback__ = error.__context__ = None
        self.error = error
        if isinstance(error, LauncherGone):
            return self._live_record.advanced(Event.FAIL, reason=Reason.LOST, detail=str(error))
        changes = {"exit_code": error.exit_code} if error.exit_code in (126, 127) else {}
        return self._live_record.advanced(
            Event.FAIL, reason=Reason.START, detail=str(error), **changes
        )

    def _log(self, error: JobworkerError) -> None:
        if trio.current_time() > self._logged_at + LOG_AGAIN_SECONDS:
            self._logged_at = trio.current_time()
            log.error("job %d waits, and is tried again: %s", self._live_record.record.id, error)
