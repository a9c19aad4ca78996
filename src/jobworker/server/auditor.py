"""The auditor: notes who did what, and has it written while the service goes on.

What changes something or shows what a job printed is noted with its outcome, and so is each call
that was denied, each connection that was refused, and the service's own start, reloads and end.
Mere looking (status, list) is not noted.

Notes are written in the order in which they come, a batch at a time, within moments: the bound is
LINGER_SECONDS and the disk's pace. What comes in vain can be had without a right or at no cost, so
a flood of it must not fill the disk: beyond a burst it is written at a bounded rate, and what was
left out is counted in a row of its own. Each name has a rate of its own, and all who have none
share one: nobody can hide another's attempts, or its own under a name, behind a flood without one.
"""

import logging
import math
from collections import deque
from collections.abc import Callable
from datetime import datetime

import trio
from attrs import define, field

from jobworker.errors import JobworkerError, NotFound, PermissionDenied
from jobworker.jobs.audit import AuditRow
from jobworker.jobs.history import History
from jobworker.model.access import Permission
from jobworker.pki.identity import Identity
from jobworker.protocol import messages as m
from jobworker.protocol.methods import Method
from jobworker.server.gate import jobs_named

log = logging.getLogger("jobworker.server")

LINGER_SECONDS = 0.05
MAX_WAITING = 10_000
"""Notes that wait for a disk which takes none; more are counted and left out."""
VAIN_BURST = 100
VAIN_PER_SECOND = 0.1
DETAIL_CHARACTERS = 200
SUPPRESSED = "audit.suppressed"


@define
class _Bucket:
    """What may still be noted of one name's vain attempts."""

    filled_at: float
    tokens: float = VAIN_BURST

    def take(self, now: float) -> bool:
        grown = self.tokens + (now - self.filled_at) * VAIN_PER_SECOND
        self.tokens, self.filled_at = min(VAIN_BURST, grown), now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@define(eq=False)
class Auditor:
    """Of one service."""

    _history: History
    _clock: Callable[[], datetime]
    _waiting: deque[AuditRow] = field(factory=deque)
    _arrival: trio.Event = field(factory=trio.Event)
    _suppressed: int = 0
    _buckets: dict[str, _Bucket] = field(factory=dict)
    """By the certificate's name, of which there are as many as the CA has given; "" is nobody's."""

    def service(self, action: str, outcome: str = "ok", detail: str = "") -> None:
        """Note what the service itself did."""
        self._note(AuditRow(at=self._clock(), action=action, outcome=outcome, detail=_cut(detail)))

    def refused(self, peer: str, why: str, who: Identity | None = None) -> None:
        """Note a connection that was not let in."""
        self._note_vain(self._row("connection.refused", peer, who, "refused", why))

    def dismissed(self, peer: str, why: str, who: Identity) -> None:
        """Note a connection that was ended for its certificate's sake."""
        self._note(self._row("connection.ended", peer, who, "certificate_refused", why))

    def called(
        self, who: Identity, peer: str, method: Method, params: object, result: object
    ) -> None:
        """Note a call that was answered, if it is of those that are noted."""
        if method.permission is not Permission.VIEW:
            self._note(
                self._row(method.name, peer, who, "ok", _subject(params), _job_of(params, result))
            )

    def failed(
        self, who: Identity, peer: str, method: Method, params: object, error: JobworkerError
    ) -> None:
        """Note a call that was not, if it is of those, or was denied."""
        denied = isinstance(error, PermissionDenied | NotFound)
        if denied or method.permission is not Permission.VIEW:
            row = self._row(
                method.name, peer, who, error.name, error.message, _job_of(params, error.data)
            )
            self._note_vain(row)

    def _row(
        self,
        action: str,
        peer: str,
        who: Identity | None,
        outcome: str,
        detail: str,
        job: int | None = None,
    ) -> AuditRow:
        return AuditRow(
            at=self._clock(),
            name=who.common_name if who else "",
            serial=who.serial if who else "",
            role=who.role if who else "",
            peer=peer,
            action=action,
            job=job,
            outcome=outcome,
            detail=_cut(detail),
        )

    def _note_vain(self, row: AuditRow) -> None:
        now = trio.current_time()
        bucket = self._buckets.setdefault(row.name, _Bucket(now))
        if bucket.take(now):
            self._note(row)
            return
        self._suppressed += 1
        if self._suppressed == 1:
            self._arrival.set()

    def _note(self, row: AuditRow) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._suppressed += 1
            return
        self._waiting.append(row)
        self._arrival.set()

    async def serve(self) -> None:
        """Write what comes; once cancelled, what is left, and then no more."""
        tell_at = trio.current_time()
        try:
            while True:
                with trio.move_on_at(tell_at if self._suppressed else math.inf):
                    await self._arrival.wait()
                self._arrival = trio.Event()
                await trio.sleep(LINGER_SECONDS)
                if self._suppressed and trio.current_time() >= tell_at:
                    self._tell_suppressed()
                    tell_at = trio.current_time() + 1 / VAIN_PER_SECOND
                await self._write()
        finally:
            self._tell_suppressed()
            await self._write()

    async def _write(self) -> None:
        if not self._waiting:
            return
        rows = list(self._waiting)
        self._waiting.clear()
        with trio.CancelScope(shield=True):  # waits for the disk alone
            try:
                await self._history.note(rows)
            except JobworkerError as error:
                log.error("%s", error)

    def _tell_suppressed(self) -> None:
        if self._suppressed:
            count, self._suppressed = self._suppressed, 0
            self._waiting.append(
                AuditRow(
                    at=self._clock(),
                    action=SUPPRESSED,
                    outcome="suppressed",
                    detail=f"{count} more came too fast to be noted one by one",
                )
            )


def _subject(params: object) -> str:
    return repr(params.job.command) if isinstance(params, m.RunParams) else ""


def _job_of(params: object, outcome: object) -> int | None:
    if isinstance(outcome, m.RunResult):
        return outcome.job.id
    if isinstance(outcome, dict) and isinstance(outcome.get("job"), int):
        return int(outcome["job"])
    return next(iter(jobs_named(params)), None)


def _cut(text: str) -> str:
    return text if len(text) <= DETAIL_CHARACTERS else text[: DETAIL_CHARACTERS - 1] + "…"
