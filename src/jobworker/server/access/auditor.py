"""The auditor: records which client did what in the audit log, while the service goes on.

The auditor records, with its outcome, each call that changes something or shows a job's output. It
also records each denied call, each refused connection, and the service's own start, reloads and
end. Calls that only read records (status, list) are not recorded.

Rows are written in the order in which they come, in batches, within moments: LINGER_SECONDS and the
speed of the disk are the bound. A client needs no right to cause a row about a failed attempt
(denied, not found, malformed). So a flood of these must not fill the disk: a token bucket allows a
burst, and then a bounded rate. Each name has a bucket, and all clients without a name share one. So
no client can hide another's attempts, or its own attempts under a name, behind a flood without a
name. Each pair of action and outcome (a kind) has a small bucket besides. So no name can hide one
kind of attempt behind a flood of another kind. Every ten seconds a row for each name summarizes the
rows that were left out: how often each kind came, and about which jobs.

Calls that succeed and change nothing (`job.log`, `job.plan`, a second `job.stop`) cost a client
nothing either. So each name has a small bucket for each action on each job. The first such calls
are always recorded, so that no client reads a job's output without a row. If there are too many of
these buckets, further calls are limited like failed attempts.
"""

import logging
import math
import shlex
from collections import deque
from collections.abc import Callable
from datetime import datetime

import trio
from attrs import Factory, define, evolve, field

from jobworker.errors import JobworkerError, NotFound, PermissionDenied
from jobworker.jobs.history.audit import AuditRow
from jobworker.jobs.history.history import History
from jobworker.model.access import Permission
from jobworker.model.summary import short_command
from jobworker.pki.identity import Identity
from jobworker.protocol import messages as m
from jobworker.protocol.methods import Method
from jobworker.server.access.authorization import jobs_named
from jobworker.token_bucket import TokenBucket

log = logging.getLogger("jobworker.server")

LINGER_SECONDS = 0.05
AGAIN_SECONDS = 1.0
"""The time after which rows that the disk refused are written again."""
MAX_WAITING = 10_000
"""The most rows that wait for a disk which takes none; further rows are counted and left out."""
VAIN_BURST, VAIN_PER_SECOND = 100, 0.1
"""Token bucket for one name's rows about failed attempts."""
KIND_BURST, KIND_PER_SECOND = 5, 1 / 600
"""Token bucket for each kind of one name besides; there are a hundred kinds at most. Also the
bucket for calls that change nothing, for each triple of name, action and job."""
MAX_REPEATED = 10_000
"""The most triples of name, action and job that have a bucket at a time."""
REPEATABLE = frozenset({"job.log", "job.plan", "job.stop", "job.prune"})
"""Calls that may succeed again and again, and change nothing."""
TELL_SECONDS = 10.0
DETAIL_CHARACTERS = 200
MAX_KINDS_TOLD = 12
SUPPRESSED = "audit.suppressed"
MALFORMED = "request.refused"
"""The action of a message that is no call: an unknown method, invalid parameters, no JSON-RPC."""

_Kind = tuple[str, str]
"""An action and its outcome."""


@define
class _Left:
    """The rows of one kind that were left out: their number, and the lowest and highest job id."""

    count: int = 0
    jobs: tuple[int, int] | None = None

    def add(self, job: int | None) -> None:
        self.count += 1
        if job is not None:
            low, high = self.jobs or (job, job)
            self.jobs = min(low, job), max(high, job)

    def told(self, kind: _Kind) -> str:
        words = f"{kind[0]} ({kind[1]}) {self.count} times"
        if self.jobs is None:
            return words
        low, high = self.jobs
        return f"{words}, job {low}" if low == high else f"{words}, jobs {low} to {high}"


@define
class _Suppressed:
    """The rows of one name that were left out: the last one, and their counts by kind."""

    last: AuditRow
    kinds: dict[_Kind, _Left] = Factory(dict)

    def add(self, row: AuditRow) -> None:
        self.last = row
        self.kinds.setdefault((row.action, row.outcome), _Left()).add(row.job)

    def row(self, at: datetime) -> AuditRow:
        count = sum(left.count for left in self.kinds.values())
        told = [left.told(kind) for kind, left in self.kinds.items()]
        more = len(told) - MAX_KINDS_TOLD
        kinds = "; ".join([*told[:MAX_KINDS_TOLD], *([f"and {more} kinds"] if more > 0 else [])])
        return evolve(
            self.last,
            at=at,
            action=SUPPRESSED,
            outcome="suppressed",
            job=None,
            detail=f"{count} more came too fast to have a row each: {kinds}",
        )


@define(eq=False)
class Auditor:
    """The audit log of one service: takes rows at once, and writes them in a task (`serve`)."""

    _history: History
    _clock: Callable[[], datetime]
    _waiting: deque[AuditRow] = field(factory=deque)
    _arrival: trio.Event = field(factory=trio.Event)
    _suppressed: dict[str, _Suppressed] = field(factory=dict)
    """By the certificate's name; the CA bounds how many names there are. Clients without a name
    have ""."""
    _buckets: dict[str, TokenBucket] = field(factory=dict)
    """By name, as in `_suppressed`."""
    _kinds: dict[tuple[str, _Kind], TokenBucket] = field(factory=dict)
    _repeated: dict[tuple[str, str, int | None], TokenBucket] = field(factory=dict)
    """By name, action and job; the bucket that was used last stands at the end."""
    _refused: bool = False
    """Whether the disk refused the last rows."""

    def service(self, action: str, outcome: str = "ok", detail: str = "") -> None:
        """Record an action of the service itself, such as its start."""
        self._note(AuditRow(at=self._clock(), action=action, outcome=outcome, detail=_cut(detail)))

    def refused(self, peer: str, why: str, who: Identity | None = None) -> None:
        """Record a connection that was refused, and why."""
        self._note_vain(self._row("connection.refused", peer, who, "refused", why))

    def dismissed(self, peer: str, why: str, who: Identity) -> None:
        """Record a connection that was ended because of its certificate or role, and why."""
        self._note(self._row("connection.ended", peer, who, "certificate_refused", why))

    def called(
        self, who: Identity, peer: str, method: Method, params: object, result: object
    ) -> None:
        """Record a call that succeeded, unless it only read records."""
        if method.permission is Permission.VIEW:
            return
        row = self._row(method.name, peer, who, "ok", _subject(params), _job_of(params, result))
        removed = isinstance(result, m.Removed) and result.jobs
        if method.name in REPEATABLE and not removed:
            self._note_repeatable(row)
        else:
            self._note(row)

    def failed(
        self, who: Identity, peer: str, method: Method, params: object, error: JobworkerError
    ) -> None:
        """Record a call that failed. A call that only reads records is recorded only if denied."""
        denied = isinstance(error, PermissionDenied | NotFound)
        if denied or method.permission is not Permission.VIEW:
            row = self._row(
                method.name, peer, who, error.name, error.message, _job_of(params, error.data)
            )
            self._note_vain(row)

    def malformed(self, who: Identity, peer: str, error: JobworkerError) -> None:
        """Record a message that was no call of this protocol."""
        self._note_vain(self._row(MALFORMED, peer, who, error.name, error.message))

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
        now, kind = trio.current_time(), (row.action, row.outcome)
        of_name = self._buckets.setdefault(row.name, TokenBucket(now, VAIN_BURST, VAIN_PER_SECOND))
        of_kind = self._kinds.setdefault(
            (row.name, kind), TokenBucket(now, KIND_BURST, KIND_PER_SECOND)
        )
        if of_name.take(now) or of_kind.take(now):
            self._note(row)
        else:
            self._suppress(row)

    def _note_repeatable(self, row: AuditRow) -> None:
        now, key = trio.current_time(), (row.name, row.action, row.job)
        bucket = self._repeated.pop(key, None)
        if bucket is None:
            if len(self._repeated) >= MAX_REPEATED:
                oldest = next(iter(self._repeated))
                if not self._repeated[oldest].is_full(now):
                    self._note_vain(row)
                    return
                del self._repeated[oldest]
            bucket = TokenBucket(now, KIND_BURST, KIND_PER_SECOND)
        self._repeated[key] = bucket
        if bucket.take(now):
            self._note(row)
        else:
            self._suppress(row)

    def _note(self, row: AuditRow) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._suppress(row)
            return
        self._waiting.append(row)
        self._arrival.set()

    def _suppress(self, row: AuditRow) -> None:
        if not self._suppressed:
            self._arrival.set()
        self._suppressed.setdefault(row.name, _Suppressed(row)).add(row)

    async def serve(self) -> None:
        """Write rows as they come, never returns. Once cancelled, write the rows that are left."""
        tell_at = trio.current_time()
        try:
            while True:
                with trio.move_on_at(tell_at if self._suppressed else math.inf):
                    await self._arrival.wait()
                self._arrival = trio.Event()
                await trio.sleep(LINGER_SECONDS)
                if self._suppressed and trio.current_time() >= tell_at:
                    self._tell_suppressed()
                    tell_at = trio.current_time() + TELL_SECONDS
                if not await self._write():
                    await trio.sleep(AGAIN_SECONDS)
                    self._arrival.set()
        finally:
            self._tell_suppressed()
            if not await self._write():
                log.error("%d rows of the audit log are lost", len(self._waiting))

    async def _write(self) -> bool:
        """Write the waiting rows. Returns whether the disk took them; if not, they wait on."""
        if not self._waiting:
            return True
        rows = list(self._waiting)
        self._waiting.clear()
        with trio.CancelScope(shield=True):  # waits for the disk alone
            try:
                await self._history.add_audit_rows(rows)
            except JobworkerError as error:
                if not self._refused:
                    log.error("%s; the rows wait", error)
                self._refused = True
                self._waiting.extendleft(reversed(rows))
                return False
        if self._refused:
            log.info("the audit log is written again")
        self._refused = False
        return True

    def _tell_suppressed(self) -> None:
        told, self._suppressed = self._suppressed, {}
        self._waiting.extend(each.row(self._clock()) for each in told.values())


def _subject(params: object) -> str:
    return shlex.join(short_command(params.job.command)) if isinstance(params, m.RunParams) else ""


def _job_of(params: object, outcome: object) -> int | None:
    if isinstance(outcome, m.RunResult):
        return outcome.job.id
    if isinstance(outcome, dict) and isinstance(outcome.get("job"), int):
        return int(outcome["job"])
    return next(iter(jobs_named(params)), None)


def _cut(text: str) -> str:
    return text if len(text) <= DETAIL_CHARACTERS else text[: DETAIL_CHARACTERS - 1] + "…"
