"""What each method does, once the authorization has let the call pass: most of them call the
supervisor.

Each function takes the caller and the method's parameters. It returns the method's result, or
raises a JobworkerError for the caller. The functions hold no state and do no I/O of their own. They
check no permission: the authorization has authorized the call by its row of the table of methods.
The caller may touch each job that the parameters name. An operation that returns other jobs reads
`Caller.only_owner`. The table at the end has a function for every row of the table of methods.
"""

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import cast

import trio
from attrs import evolve, field, frozen

import jobworker
from jobworker.errors import InvalidParams, JobworkerError
from jobworker.incidents import Incidents
from jobworker.jobs.history.search import Filter
from jobworker.jobs.output.index import LineStart
from jobworker.jobs.output.search import Start
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.access import Permission
from jobworker.model.job import JobId, JobRecord, parse_signal
from jobworker.model.lifecycle import State
from jobworker.model.summary import summarize, whole
from jobworker.model.units import from_nanoseconds, nanoseconds
from jobworker.protocol import messages as m
from jobworker.protocol.discovery import describe
from jobworker.protocol.methods import Method
from jobworker.protocol.session import Encoded
from jobworker.sandbox.service.host_facts import HostFacts
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.serialization.json_text import dumps
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.authorization import Authorization, Caller
from jobworker.server.delivery.record_json import encode_record, read_spec, summary_of, with_spec
from jobworker.server.fairness.call_budget import CallBudget
from jobworker.server.fairness.connection_limiter import ConnectionLimiter
from jobworker.server.fairness.fair_scheduling import ActiveClients, FairScheduler, FairThreadPool
from jobworker.server.fairness.send_budget import ALONE, SendBudget
from jobworker.server.fairness.slots import Slots
from jobworker.server.fairness.wait_quota import WaitQuota
from jobworker.server.host.disk_promises import DiskPromises
from jobworker.server.requests.host_checks import check_against_host, check_runtime

MESSAGES_A_TURN = 4
"""Messages that pass in one turn of the event loop: they take one to two milliseconds."""
MESSAGES_A_SECOND = 250.0
"""The rate of one name while others are active; a client that asks without a pause sends ten times
as many. With 500 a run of `true` took 2.5 times as long beside tails of long indexes and ends of
large jobs, and with 250 it takes 1.2 to 1.5 times."""
INCOMING_A_TURN = 1 << 19
"""Incoming bytes that pass in one turn: the server unmasks them in one to two milliseconds. Other
work on incoming data is counted as the bytes that are unmasked in the same time (`frame_scan`)."""
INCOMING_A_SECOND = float(1 << 26)
"""The rate of one name in bytes while others are active: a sixth of the loop. It lets 16 MB a
second come in as large messages, or 1,000 small ones."""
HANDSHAKES_A_TURN = 1
"""One of the two halves of a handshake: the signature, or the work after the client's answer. Each
takes a millisecond."""
HANDSHAKE_REST_SECONDS = 0.003
"""The longest rest after such a turn. It is short, since honest clients of a flood's network wait
in the same line, and hundreds may."""


@frozen(kw_only=True)
class OperationContext:
    """The parts of the service that operations use, and the limits that all connections share."""

    supervisor: Supervisor
    launcher: LauncherClient
    promises: DiskPromises
    host: HostFacts
    runtimes: frozenset[str]
    """The names of the runtimes in the configuration."""
    authorization: Authorization
    auditor: Auditor
    incidents: Incidents
    stall_seconds: float
    """How long a client may take no byte while data waits for it."""
    limiter: ConnectionLimiter
    send_budget: SendBudget
    active_clients: ActiveClients
    messages: FairScheduler = field(init=False)
    incoming: FairScheduler = field(init=False)
    """Delays incoming bytes, until they are a message or were refused."""
    handshakes: FairScheduler = field(init=False)
    waits: WaitQuota
    calls: CallBudget = field(factory=CallBudget)
    """Bounds the memory of calls that are being served, with their small replies."""
    requests: Slots = field(factory=lambda: Slots(in_all=8, for_each=2))
    """Slots for large requests, from their first bytes until they are served."""
    replies: Slots = field(factory=lambda: Slots(in_all=16, for_each=4))
    """Slots for large replies, until the client has taken them."""
    making: Slots = field(factory=lambda: Slots(in_all=4, for_each=1))
    """Slots for the encoding of whole records of jobs with long requests."""
    reading: FairThreadPool = field(init=False)
    """Decodes long requests in threads."""

    @messages.default
    def _messages(self) -> FairScheduler:
        return FairScheduler(MESSAGES_A_TURN, self.active_clients, rate=MESSAGES_A_SECOND)

    @incoming.default
    def _incoming(self) -> FairScheduler:
        return FairScheduler(
            INCOMING_A_TURN, self.active_clients, rate=INCOMING_A_SECOND, alone=ALONE
        )

    @reading.default
    def _reading(self) -> FairThreadPool:
        return FairThreadPool(self.active_clients)

    @handshakes.default
    def _handshakes(self) -> FairScheduler:
        return FairScheduler(HANDSHAKES_A_TURN, self.active_clients, HANDSHAKE_REST_SECONDS)


async def call(context: OperationContext, caller: Caller, method: Method, params: object) -> object:
    """Run a method for a caller and return its result; record the call in the audit.

    Raises what the authorization and the method raise.
    """
    who, peer = caller.identity, caller.peer
    try:
        find = partial(context.supervisor.record, who=who.common_name)
        await context.authorization.check_call(who, method, params, find)
        with context.active_clients.serving(who.common_name):
            result = await OPERATIONS[method.name](context, caller, params)
    except JobworkerError as error:
        context.auditor.failed(who, peer, method, params, error)
        raise
    context.auditor.called(who, peer, method, params, result)
    return result


async def _hello(_: OperationContext, caller: Caller, __: m.Nothing) -> m.Welcome:
    await trio.lowlevel.checkpoint_if_cancelled()
    who = caller.identity
    return m.Welcome(version=jobworker.__version__, name=who.common_name, role=who.role)


async def _run(context: OperationContext, caller: Caller, params: m.RunParams) -> m.RunResult:
    if params.follow is not None:
        caller.subscriptions.check_room()
    check_against_host(params.job, context.host)
    check_runtime(params.job.runtime, context.runtimes)
    unbounded = caller.role.may(Permission.UNBOUNDED)
    execution = await context.supervisor.submit(
        params.job,
        caller.identity.common_name,
        caller.role.quota,
        longest_seconds=math.inf if unbounded else context.authorization.longest_seconds,
    )
    if execution.start_error is not None:
        error = execution.start_error
        raise type(error)(
            error.message, remedy=error.remedy, data={**error.data, "job": execution.record.id}
        )
    subscription, record = None, execution.live_record.now()
    if params.follow is not None:
        # The job is admitted: after an error here the caller would run it once more.
        with suppress(JobworkerError):
            follower = await context.supervisor.follow(execution.record.id)
            opened = caller.subscriptions.open(record, follower, params.follow, None)
            subscription = opened.number
    return m.RunResult(job=summarize(record), subscription=subscription)


async def _plan(context: OperationContext, _: Caller, params: m.PlanParams) -> m.Plan:
    check_against_host(params.job, context.host)
    check_runtime(params.job.runtime, context.runtimes)
    limits, steps = await context.supervisor.plan(params.job)
    told = (m.PlannedStep(name=n, subject=s, explanation=e) for n, s, e in steps)
    return m.Plan(limits=limits, steps=tuple(told))


async def _status(context: OperationContext, caller: Caller, params: m.JobParams) -> Encoded:
    record = await context.supervisor.record(params.id, caller.identity.common_name)
    execution = context.supervisor.live(params.id)
    if execution is not None:
        record = evolve(record, usage=await execution.usage())
    shortfall = context.promises.shortfall
    warnings = [shortfall] if shortfall and record.state is State.RUNNING else []
    text = await _whole_record(context, caller, record)
    return Encoded(f'{text[:-1]},"warnings":{dumps(warnings)}}}')


async def _whole_record(context: OperationContext, caller: Caller, record: JobRecord) -> str:
    """The whole record as JSON, however long it is."""
    if not summarize(record).abridged:
        return await encode_record(caller.show(record))
    who = caller.identity.common_name
    async with context.making.slot(who):
        spec = await context.supervisor.spec_of(record.id, who) if record.abridged else None
        if spec is not None:
            if caller.role.may(Permission.RUN):
                return with_spec(record, spec)
            record = whole(record, await read_spec(spec))
        return await encode_record(caller.show(record))


async def _list(context: OperationContext, caller: Caller, params: m.ListParams) -> Encoded:
    wanted = Filter(
        states=frozenset(params.states or State),
        owner=caller.only_owner,
        name=params.name,
        labels=params.labels,
        before=params.before,
    )
    page = await context.supervisor.latest(wanted, params.limit, caller.identity.common_name)
    jobs = ",".join(text for _, text in page.records)
    return Encoded(f'{{"jobs":[{jobs}],"next":{dumps(page.next)}}}')


async def _wait(context: OperationContext, caller: Caller, params: m.JobParams) -> Encoded:
    with _waiting(context, caller, params.id):
        record = await context.supervisor.wait(params.id, caller.identity.common_name)
    return Encoded(summary_of(record)[1])


async def _stop(context: OperationContext, caller: Caller, params: m.StopParams) -> JobRecord:
    number = parse_signal(params.signal)
    who = caller.identity.common_name
    with _waiting(context, caller, params.id):
        stopped = await context.supervisor.stop(params.id, number, params.grace_seconds, who)
    return summarize(stopped)


@contextmanager
def _waiting(context: OperationContext, caller: Caller, job: JobId) -> Iterator[None]:
    """Count a call as one that waits in the block, if the job is live.

    Raises TooManyRequests.
    """
    if context.supervisor.live(job) is None:
        yield
        return
    with context.waits.waiting(caller.identity.common_name), caller.cost.waiting():
        yield


async def _log(context: OperationContext, caller: Caller, params: m.LogParams) -> m.LogResult:
    if not params.streams:
        raise InvalidParams("cannot follow the job: streams: is empty; name stdout, stderr or both")
    supervisor, who = context.supervisor, caller.identity.common_name
    record = await supervisor.record(params.id, who)
    until = None if params.follow else record.stdout_bytes + record.stderr_bytes
    since = params.since
    if params.since_seconds is not None:
        ago = supervisor.now() - timedelta(seconds=params.since_seconds)
        since = ago if since is None else max(since, ago)
    start = Start(
        offset=params.offset,
        tail_lines=params.tail_lines,
        since_ns=None if since is None else nanoseconds(since),
        starts=tuple(map(_line_start, params.starts)),
    )
    follower = await supervisor.follow(
        params.id, start, streams=params.streams, coalesce=params.coalesce, who=who
    )
    offset, starts = follower.offset, tuple(map(_stream_start, follower.starts))
    opened = caller.subscriptions.open(record, follower, params.delivery, until)
    return m.LogResult(subscription=opened.number, offset=offset, starts=starts)


def _line_start(start: m.StreamStart) -> LineStart:
    since_ns = 0 if start.since is None else nanoseconds(start.since)
    return LineStart(start.stream, start.offset, since_ns)


def _stream_start(start: LineStart) -> m.StreamStart:
    since = from_nanoseconds(start.since_ns) if start.since_ns else None
    return m.StreamStart(stream=start.stream, offset=start.offset, since=since)


async def _remove(context: OperationContext, caller: Caller, params: m.RemoveParams) -> m.Removed:
    who = caller.identity.common_name
    freed = await context.supervisor.remove(params.id, force=params.force, who=who)
    return m.Removed(jobs=(params.id,), bytes=freed)


async def _prune(context: OperationContext, caller: Caller, params: m.PruneParams) -> m.Removed:
    policy = None
    if params != m.PruneParams():
        policy = RetentionPolicy(
            max_age_seconds=params.older_than_seconds,
            max_jobs=params.keep_jobs,
            max_bytes=params.keep_bytes,
        )
    gone = await context.supervisor.prune(policy, caller.only_owner)
    return m.Removed(jobs=tuple(kept.job for kept in gone), bytes=sum(kept.size for kept in gone))


async def _credit(_: OperationContext, caller: Caller, params: m.CreditParams) -> m.Nothing:
    await trio.lowlevel.checkpoint()
    caller.subscriptions.find(params.subscription).grant(params.bytes)
    return m.Nothing()


async def _unfollow(_: OperationContext, caller: Caller, params: m.SubscriptionParams) -> m.Nothing:
    await trio.lowlevel.checkpoint()
    caller.subscriptions.cancel(params.subscription)
    return m.Nothing()


# Made at import: later the service may run as a user that cannot read the sources.
_DISCOVERY = describe(jobworker.__version__)


async def _discover(_: OperationContext, __: Caller, ___: m.Nothing) -> m.Discovery:
    await trio.lowlevel.checkpoint()
    return _DISCOVERY


async def _make_volume(context: OperationContext, _: Caller, params: m.VolumeSpec) -> m.Nothing:
    await context.launcher.make_volume(params.name, params.size_bytes, thin=params.thin)
    return m.Nothing()


async def _list_volumes(context: OperationContext, _: Caller, __: m.Nothing) -> m.Volumes:
    return m.Volumes(volumes=await context.launcher.volumes())


async def _remove_volume(context: OperationContext, _: Caller, params: m.VolumeParams) -> m.Nothing:
    await context.launcher.remove_volume(params.name)
    return m.Nothing()


_Operation = Callable[[OperationContext, Caller, object], Awaitable[object]]

OPERATIONS: dict[str, _Operation] = {
    name: cast(_Operation, function)
    for name, function in {
        "service.hello": _hello,
        "job.run": _run,
        "job.plan": _plan,
        "job.status": _status,
        "job.list": _list,
        "job.wait": _wait,
        "job.stop": _stop,
        "job.log": _log,
        "job.remove": _remove,
        "job.prune": _prune,
        "job.credit": _credit,
        "job.unfollow": _unfollow,
        "volume.create": _make_volume,
        "volume.list": _list_volumes,
        "volume.remove": _remove_volume,
        "rpc.discover": _discover,
    }.items()
}
