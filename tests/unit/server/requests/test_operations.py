"""Operations: what each client gets of each method, and what it is refused."""

import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

import jobworker
from jobworker.errors import (
    Busy,
    CommandNotFound,
    InvalidParams,
    JobworkerError,
    NotFound,
    OutputError,
    PermissionDenied,
    QuotaExceeded,
    TooManyFollows,
    TooManyRequests,
)
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.access import Permission, Scope
from jobworker.model.job import MASK, JobId, JobRecord, JobSpec, Limits, Stream
from jobworker.model.lifecycle import Reason, State
from jobworker.model.summary import MAX_COMMAND
from jobworker.model.volumes import Volume, VolumeMount
from jobworker.protocol import messages as m
from jobworker.protocol.discovery import describe
from jobworker.protocol.methods import METHODS
from jobworker.server.delivery.subscriptions import Subscription
from jobworker.server.requests import operations
from jobworker.server.requests.host_checks import check_runtime

from ...jobs.played_link import ServiceLink
from .called_service import (
    HOST,
    LONGEST_SECONDS,
    MAX_FOLLOWS,
    MAX_WAITS,
    USAGE,
    CalledService,
    open_called_service,
    plan,
    usage,
)

IN_MEMORY = Path("/dev/shm")
"""Where a service of its own for each test costs little: no test here is about the disk."""
SPEC = JobSpec(command=("any",))
PARAMS: dict[str, dict[str, object]] = {
    "job.run": {"job": SPEC},
    "job.plan": {"job": SPEC},
    **{f"job.{verb}": {"id": JobId(1)} for verb in ("status", "wait", "stop", "log", "remove")},
    "job.credit": {"subscription": 1, "bytes": 1},
    "job.unfollow": {"subscription": 1},
    "volume.create": {"name": "shared", "size_bytes": 1 << 24},
    "volume.remove": {"name": "shared"},
}
OF_A_JOB = ("job.status", "job.wait", "job.stop", "job.log", "job.remove")


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[CalledService]:
    monkeypatch.setattr(ServiceLink, "usage", usage, raising=False)
    monkeypatch.setattr(ServiceLink, "plan", plan, raising=False)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as directory:
        async with open_called_service(Path(directory)) as service:
            yield service


def subscription(service: CalledService, who: str, number: int = 1) -> Subscription:
    return service.client(who).subscriptions.find(number)


@asynccontextmanager
async def waiting(
    service: CalledService, who: str, method: str, **params: object
) -> AsyncIterator[list[object]]:
    """A client that waits while the block lasts, and what it has got after it."""
    got = list[object]()

    async def wait() -> None:
        got.append(await service.call(who, method, **params))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not got
        yield got


def faults_of(error: JobworkerError) -> list[str]:
    faults = cast(list[dict[str, str]], error.data["faults"])
    return [fault["path"] for fault in faults]


# --- who may call what ----------------------------------------------------------------------


async def test_without_its_permission_no_operation_is_reached(
    service: CalledService, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = list[str]()
    for method, row in METHODS.items():

        async def operation(*_: object, method: str = method) -> m.Nothing:
            await trio.lowlevel.checkpoint()
            reached.append(method)
            return m.Nothing()

        monkeypatch.setitem(operations.OPERATIONS, method, operation)
        service.grant("mallory", *(set(Permission) - {row.permission}))
        with pytest.raises(PermissionDenied, match=f"cannot call {method}: ") as denied:
            await service.call("mallory", method, **PARAMS.get(method, {}))
        assert "admin" in denied.value.remedy
        assert method not in reached
        assert service.audited()[-1] == ("mallory", method, "permission_denied", job_in(method))
        service.grant("mallory", row.permission)
        await service.call("mallory", method, **PARAMS.get(method, {}))
    assert reached == list(METHODS)


def job_in(method: str) -> object:
    return PARAMS.get(method, {}).get("id")


async def test_role_that_is_taken_away_denies_the_next_call(service: CalledService) -> None:
    await service.call("alice", "job.list")
    service.context.authorization.roles = type(service.context.authorization.roles)()
    with pytest.raises(PermissionDenied, match="'operator' is not a role of this server"):
        await service.call("alice", "job.list")


async def test_job_of_another_owner_does_not_exist(service: CalledService) -> None:
    job = await service.run("alice")
    for method in OF_A_JOB:
        with pytest.raises(NotFound) as hidden:
            await service.call("bob", method, id=job.id)
        with pytest.raises(NotFound) as missing:
            await service.call("bob", method, id=JobId(job.id + 1))
        assert str(hidden.value).replace("job 1:", "job 2:") == str(missing.value)
        assert hidden.value.data == missing.value.data
    assert (await service.supervisor.record(job.id)).state is State.RUNNING
    assert service.program(job).asked is None


async def test_job_that_nobody_has_does_not_exist_for_whom_all_jobs_are(
    service: CalledService,
) -> None:
    for method in OF_A_JOB:
        with pytest.raises(NotFound, match="cannot find job 7: no such job") as missing:
            await service.call("root", method, id=JobId(7))
        assert "worker-cli list" in missing.value.remedy


async def test_viewer_reaches_all_jobs_and_changes_none(service: CalledService) -> None:
    job = await service.run("alice")
    await service.call("eve", "job.status", id=job.id)
    await service.call("eve", "job.log", id=job.id)
    for method in ("job.stop", "job.remove"):
        with pytest.raises(PermissionDenied):
            await service.call("eve", method, id=job.id)
    assert (await service.supervisor.record(job.id)).state is State.RUNNING


async def test_removal_by_force_needs_the_permission_to_stop(service: CalledService) -> None:
    job = await service.run("alice")
    service.grant("carol", Permission.REMOVE)
    with pytest.raises(PermissionDenied, match="with force"):
        await service.call("carol", "job.remove", id=job.id, force=True)
    assert service.program(job).exit is None


async def test_volumes_of_all_names_need_a_role_that_reaches_all_names(
    service: CalledService,
) -> None:
    service.grant("carol", *Permission, scope=Scope.OWN)
    for method in ("volume.list", "volume.create", "volume.remove"):
        with pytest.raises(PermissionDenied, match="all names share the volumes"):
            await service.call("carol", method, **PARAMS.get(method, {}))
    with pytest.raises(PermissionDenied, match="all names share the volumes"):
        await service.run("carol", volumes=(VolumeMount(name="shared"),))
    assert not service.launcher.executed


# --- audit ----------------------------------------------------------------------------------


async def test_what_changes_a_job_is_audited_with_its_job(service: CalledService) -> None:
    job = await service.run("alice")
    await service.call("eve", "job.log", id=job.id)
    await service.call("alice", "job.status", id=job.id)
    await service.call("alice", "job.stop", id=job.id)
    with pytest.raises(NotFound):
        await service.call("bob", "job.status", id=job.id)
    assert service.audited() == [
        ("alice", "job.run", "ok", job.id),
        ("eve", "job.log", "ok", job.id),
        ("alice", "job.stop", "ok", job.id),
        ("bob", "job.status", "not_found", job.id),
    ]


async def test_client_counts_as_active_while_its_call_is_served(service: CalledService) -> None:
    job = await service.run("alice")
    active_clients = service.context.active_clients
    active_clients._until.clear()
    assert not active_clients.has_others(())
    async with waiting(service, "alice", "job.wait", id=job.id):
        assert active_clients.has_others(())
        assert not active_clients.has_others({"alice": ()})
        await service.end(job)


# --- service.hello, rpc.discover ------------------------------------------------------------


async def test_hello_tells_the_caller_who_it_is(service: CalledService) -> None:
    assert await service.call("eve", "service.hello") == m.Welcome(
        version=jobworker.__version__, name="eve", role="viewer"
    )


async def test_protocol_is_described_to_a_viewer(service: CalledService) -> None:
    assert await service.call("eve", "rpc.discover") == describe(jobworker.__version__)


# --- job.run --------------------------------------------------------------------------------


async def test_run_answers_with_a_summary_of_a_running_job(service: CalledService) -> None:
    job = await service.run("alice", environment={"SECRET": "value"}, name="mine")
    assert (job.state, job.owner, job.spec.name) == (State.RUNNING, "alice", "mine")
    assert job.abridged == ("environment",)
    assert service.program(job).exit is None


async def test_quota_of_the_callers_role_bounds_its_jobs(service: CalledService) -> None:
    for _ in range(3):
        await service.run("alice")
    with pytest.raises(QuotaExceeded):
        await service.run("alice")
    assert (await service.run("bob")).state is State.PENDING


@pytest.mark.parametrize(
    ("who", "asked", "given"),
    [
        ("alice", None, LONGEST_SECONDS),
        ("alice", LONGEST_SECONDS, LONGEST_SECONDS),
        ("root", None, 0),
        ("root", 0, 0),
        ("root", LONGEST_SECONDS + 1, LONGEST_SECONDS + 1),
    ],
)
async def test_only_who_may_go_without_a_time_limit_does(
    service: CalledService, who: str, asked: float | None, given: float
) -> None:
    assert (await service.run(who, timeout_seconds=asked)).spec.timeout_seconds == given


@pytest.mark.parametrize("seconds", [0, LONGEST_SECONDS + 1])
async def test_time_limit_beyond_the_longest_is_denied(
    service: CalledService, seconds: float
) -> None:
    for method in ("job.run", "job.plan"):
        job = JobSpec(command=("any",), timeout_seconds=seconds)
        with pytest.raises(PermissionDenied, match=f"cannot call {method} with"):
            await service.call("alice", method, job=job)
    assert not service.launcher.executed


async def test_run_with_follow_subscribes_from_the_first_byte(service: CalledService) -> None:
    follow = m.Delivery(encoding=m.Encoding.BINARY, credit_bytes=9)
    result = await service.call("alice", "job.run", job=SPEC, follow=follow)
    assert isinstance(result, m.RunResult)
    assert result.subscription == 1
    opened = subscription(service, "alice")
    assert (opened.record.id, opened.follower.offset) == (result.job.id, 0)
    assert (opened.encoding, opened.until) == (m.Encoding.BINARY, None)
    assert await opened.room(1) == 9
    assert (await service.call("alice", "job.run", job=SPEC)) == m.RunResult(
        job=await service.supervisor.record(JobId(2))
    )


async def test_nothing_is_run_where_there_is_no_room_to_follow(service: CalledService) -> None:
    job = await service.run("alice")
    for _ in range(MAX_FOLLOWS):
        await service.call("alice", "job.log", id=job.id)
    with pytest.raises(TooManyFollows):
        await service.call("alice", "job.run", job=SPEC, follow=m.Delivery())
    assert len(service.launcher.executed) == 1
    await service.call("alice", "job.run", job=SPEC)


async def test_admitted_job_is_told_even_if_it_cannot_be_followed(
    service: CalledService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error its client would run it once more."""

    async def follow(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise OutputError("cannot read the output")

    monkeypatch.setattr(Supervisor, "follow", follow)
    result = await service.call("alice", "job.run", job=SPEC, follow=m.Delivery())
    assert isinstance(result, m.RunResult)
    assert result.subscription is None
    assert result.job.state is State.RUNNING


async def test_failed_start_is_an_error_that_names_its_job(service: CalledService) -> None:
    with pytest.raises(CommandNotFound) as failed:
        await service.run("alice", "absent")
    assert failed.value.data["job"] == 1
    assert failed.value.data["step"] == "execute"
    assert failed.value.remedy
    record = await service.supervisor.record(JobId(1))
    assert (record.state, record.reason) == (State.FAILED, Reason.START)
    assert service.audited() == [("alice", "job.run", "command_not_found", 1)]


BEYOND = [
    ("limits.cpu_percent", {"limits": Limits(cpu_percent=100 * HOST.cpus + 1)}, "ask for less"),
    ("limits.memory_bytes", {"limits": Limits(memory_bytes=HOST.memory_bytes + 1)}, "ask for less"),
    ("cpu_cores", {"cpu_cores": "0-3"}, "choose among them"),
    ("runtime", {"runtime": "ruby"}, "ask for one of node, python"),
]


@pytest.mark.parametrize(("path", "spec", "remedy"), BEYOND, ids=[row[0] for row in BEYOND])
async def test_what_this_host_does_not_have_is_refused_by_name(
    service: CalledService, path: str, spec: dict[str, object], remedy: str
) -> None:
    job = JobSpec(command=("any",), **spec)  # type: ignore[arg-type]
    for method in ("job.run", "job.plan"):
        with pytest.raises(InvalidParams, match=f"cannot run the command: {path}: ") as refused:
            await service.call("alice", method, job=job)
        assert refused.value.remedy.startswith(remedy)
        assert faults_of(refused.value) == [f"job.{path}"]
    assert not service.launcher.executed
    assert (await service.call("alice", "job.list")) == {"jobs": [], "next": None}


async def test_refusal_tells_what_there_is(service: CalledService) -> None:
    with pytest.raises(InvalidParams, match="201 is more than 200, all of this host's 2 cores"):
        await service.run("alice", limits=Limits(cpu_percent=201))
    with pytest.raises(InvalidParams, match="more than 1024 MiB, all of this host's memory"):
        await service.run("alice", limits=Limits(memory_bytes=2 << 30))
    with pytest.raises(InvalidParams, match="no core 1 for jobs; it has 0, 3"):
        await service.run("alice", cpu_cores="0-3")


async def test_all_that_this_host_has_may_be_asked_for(service: CalledService) -> None:
    limits = Limits(cpu_percent=100 * HOST.cpus, memory_bytes=HOST.memory_bytes)
    job = await service.run("alice", limits=limits, cpu_cores="0,3", runtime="python")
    assert job.spec.limits.cpu_percent == 200
    assert job.spec.limits.memory_bytes == HOST.memory_bytes


def test_without_runtimes_the_remedy_is_to_ask_for_none() -> None:
    with pytest.raises(InvalidParams, match="there is no 'ruby' here") as refused:
        check_runtime("ruby", frozenset())
    assert "ask for none" in refused.value.remedy
    check_runtime("", frozenset())


# --- job.plan -------------------------------------------------------------------------------


async def test_plan_tells_limits_and_steps_and_runs_nothing(service: CalledService) -> None:
    planned = await service.call("alice", "job.plan", job=JobSpec(command=("some",)))
    assert planned == m.Plan(
        limits=service.supervisor._rules.defaults,
        steps=(m.PlannedStep(name="execute", subject="some", explanation="Execute the program."),),
    )
    assert not service.launcher.executed


# --- job.status -----------------------------------------------------------------------------


async def status(service: CalledService, who: str, job: JobRecord) -> dict[str, object]:
    told = await service.call(who, "job.status", id=job.id)
    assert isinstance(told, dict)
    return told


async def test_status_of_a_running_job_has_its_present_usage(service: CalledService) -> None:
    job = await service.run("alice")
    told = await status(service, "alice", job)
    assert told["usage"]["memory_bytes"] == USAGE.memory_bytes  # type: ignore[index]
    assert (told["state"], told["warnings"], told["abridged"]) == ("RUNNING", [], [])
    await service.end(job, 3)
    told = await status(service, "alice", job)
    assert (told["state"], told["exit_code"]) == ("FAILED", 3)
    assert told["usage"]["memory_bytes"] == 0  # type: ignore[index]


async def test_only_jobs_that_run_are_warned_of_a_disk_without_room(
    service: CalledService,
) -> None:
    job = await service.run("alice")
    service.context.promises.shortfall = "the host has little"
    assert (await status(service, "alice", job))["warnings"] == ["the host has little"]
    await service.end(job)
    assert (await status(service, "alice", job))["warnings"] == []


@pytest.mark.parametrize("ended", [False, True], ids=["live", "ended"])
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
async def test_values_of_variables_are_for_those_who_may_run_jobs(
    service: CalledService, *, ended: bool, long: bool
) -> None:
    argument = "x" * (2 * MAX_COMMAND if long else 1)
    variables = {"environment": {"A": "value"}, "secret_environment": {"S": "secret"}}
    job = await service.run("alice", "any", argument, **variables)
    if ended:
        await service.end(job)
    for who, value in (("alice", "value"), ("root", "value"), ("eve", MASK)):
        told = await status(service, who, job)
        spec = cast(dict[str, object], told["spec"])
        assert spec["environment"] == {"A": value}, who
        assert spec["secret_environment"] == {"S": MASK}
        assert spec["command"] == ["any", argument], "all of it"
        assert told["abridged"] == []


async def test_long_request_of_a_removed_job_stays_a_summary(
    service: CalledService, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await service.run_to_its_end("alice", environment={"A": "value"})

    async def gone(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Supervisor, "spec_of", gone)
    told = await status(service, "alice", job)
    assert told["abridged"] == ["environment"]
    assert told["spec"]["environment"] == {}  # type: ignore[index]


async def test_one_long_record_of_a_name_is_made_at_a_time(service: CalledService) -> None:
    job = await service.run("alice", environment={"A": "value"})
    plain = await service.run("alice")
    async with service.context.making.slot("alice"):
        await status(service, "alice", plain)
        await status(service, "root", job)
        async with waiting(service, "alice", "job.status", id=job.id):
            service.context.making.release("alice")
        await service.context.making.acquire("alice")


# --- job.list -------------------------------------------------------------------------------


async def listed(service: CalledService, who: str, **params: object) -> list[int]:
    page = cast(dict[str, list[dict[str, int]]], await service.call(who, "job.list", **params))
    return [job["id"] for job in page["jobs"]]


async def test_list_has_all_jobs_or_the_callers_own(service: CalledService) -> None:
    ended = await service.run_to_its_end("alice")
    alices, bobs = await service.run("alice"), await service.run("bob")
    assert await listed(service, "alice") == [alices.id, ended.id]
    assert await listed(service, "bob") == [bobs.id]
    for who in ("root", "eve"):
        assert await listed(service, who) == [bobs.id, alices.id, ended.id]


async def test_list_has_jobs_that_fit_every_condition(service: CalledService) -> None:
    await service.run_to_its_end("root", name="old", labels={"a": "1"})
    await service.run("root", name="new", labels={"a": "1", "b": "2"})
    await service.run("root", name="new")
    assert await listed(service, "root", states=(State.COMPLETED,)) == [1]
    assert await listed(service, "root", states=(State.RUNNING,)) == [3, 2]
    assert await listed(service, "root", states=(State.RUNNING, State.COMPLETED)) == [3, 2, 1]
    assert await listed(service, "root", name="new") == [3, 2]
    assert await listed(service, "root", labels={"a": "1"}) == [2, 1]
    assert await listed(service, "root", labels={"a": "1"}, name="new") == [2]


async def test_pages_of_a_list_go_on_where_the_one_before_ended(service: CalledService) -> None:
    for _ in range(2):
        await service.run_to_its_end("root")
    await service.run("root")
    page = cast(dict[str, object], await service.call("root", "job.list", limit=2))
    assert page["next"] == 2
    assert await listed(service, "root", limit=2) == [3, 2]
    assert await listed(service, "root", limit=2, before=2) == [1]
    last = cast(dict[str, object], await service.call("root", "job.list", before=2))
    assert last["next"] is None


# --- job.wait, job.stop ---------------------------------------------------------------------


async def test_wait_answers_at_the_end_with_the_summary(service: CalledService) -> None:
    job = await service.run("alice", environment={"A": "value"})
    async with waiting(service, "alice", "job.wait", id=job.id) as got:
        await service.end(job, 3)
    (told,) = cast(list[dict[str, object]], got)
    assert (told["state"], told["exit_code"]) == ("FAILED", 3)
    assert told["abridged"] == ["environment"]
    assert await service.call("eve", "job.wait", id=job.id) == told


@pytest.mark.parametrize("method", ["job.wait", "job.stop"])
async def test_one_name_waits_a_bounded_number_of_times(
    service: CalledService, method: str
) -> None:
    job = await service.run("alice")
    service.program(job).on_signal = "goes on"
    async with trio.open_nursery() as nursery:
        for _ in range(MAX_WAITS):
            nursery.start_soon(lambda: service.call("alice", method, id=job.id))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(TooManyRequests) as refused:
            await service.call("alice", method, id=job.id)
        assert "limits.max_waits" in refused.value.remedy
        with trio.move_on_after(0):
            await service.call("root", method, id=job.id)
        await service.end(job)
    await service.call("alice", method, id=job.id)


async def test_stop_sends_the_signal_and_answers_at_the_end(service: CalledService) -> None:
    job = await service.run("alice", environment={"A": "value"})
    record = await service.call("alice", "job.stop", id=job.id, signal="int")
    assert isinstance(record, JobRecord)
    assert (record.state, record.signal) == (State.STOPPED, 2)
    assert record.abridged == ("environment",)
    assert await service.call("alice", "job.stop", id=job.id) == record, "it stays as it is"


async def test_stop_by_an_unknown_signal_touches_nothing(service: CalledService) -> None:
    job = await service.run("alice")
    with pytest.raises(InvalidParams, match="no such signal") as refused:
        await service.call("alice", "job.stop", id=job.id, signal="NEVER")
    assert refused.value.remedy
    assert service.program(job).asked is None


@pytest.mark.parametrize("seconds", [None, 0, 7.0])
async def test_grace_of_the_call_counts(
    service: CalledService, monkeypatch: pytest.MonkeyPatch, seconds: float | None
) -> None:
    job, asked = await service.run("alice"), list[object]()

    async def stop(_: Supervisor, *arguments: object) -> JobRecord:
        await trio.lowlevel.checkpoint()
        asked.append(arguments)
        return job

    monkeypatch.setattr(Supervisor, "stop", stop)
    await service.call("alice", "job.stop", id=job.id, signal="15", grace_seconds=seconds)
    assert asked == [(job.id, signal.SIGTERM, seconds, "alice")]


# --- job.log, job.credit, job.unfollow ------------------------------------------------------


async def log(service: CalledService, who: str, job: JobRecord, **params: object) -> m.LogResult:
    opened = await service.call(who, "job.log", id=job.id, **params)
    assert isinstance(opened, m.LogResult)
    return opened


async def test_log_of_no_stream_is_refused(service: CalledService) -> None:
    job = await service.run("alice")
    with pytest.raises(InvalidParams, match="streams: is empty"):
        await log(service, "alice", job, streams=())


async def test_log_without_follow_ends_at_the_bytes_that_exist_now(
    service: CalledService,
) -> None:
    job = await service.run("alice")
    for stream, data in enumerate((b"12345", b"67")):
        os.write(service.program(job).writes[stream], data)
    await service.end(job)
    await log(service, "eve", job, follow=False)
    await log(service, "eve", job)
    assert subscription(service, "eve", 1).until == 7
    assert subscription(service, "eve", 2).until is None


async def test_log_begins_at_the_offset_and_ends_with_its_credit(service: CalledService) -> None:
    job = await service.run_to_its_end("alice", b"12345")
    delivery = m.Delivery(encoding=m.Encoding.TEXT, credit_bytes=2)
    opened = await log(service, "alice", job, offset=2, delivery=delivery)
    assert (opened.subscription, opened.offset) == (1, 2)
    made = subscription(service, "alice")
    assert (made.encoding, await made.room(1)) == (m.Encoding.TEXT, 2)
    await service.call("alice", "job.credit", subscription=1, bytes=3)
    assert await made.room(1) == 5
    assert (await log(service, "alice", job, offset=5)).offset == 5


async def test_log_cannot_begin_beyond_the_output(service: CalledService) -> None:
    job = await service.run_to_its_end("alice", b"12345")
    with pytest.raises(InvalidParams):
        await log(service, "alice", job, offset=6)
    with pytest.raises(InvalidParams):
        service.client("alice").subscriptions.find(1)


async def test_log_of_one_stream_has_no_byte_of_the_other(service: CalledService) -> None:
    job = await service.run_to_its_end("alice", b"out")
    await log(service, "alice", job, streams=(Stream.STDERR,))
    assert await subscription(service, "alice").follower.receive() is None
    await log(service, "alice", job, streams=(Stream.STDOUT,))
    chunk = await subscription(service, "alice", 2).follower.receive()
    assert chunk is not None
    assert bytes(chunk.data) == b"out"


async def test_pieces_of_different_times_are_joined_where_that_is_wanted(
    service: CalledService,
) -> None:
    job = await service.run("alice")
    execution = service.supervisor.live(job.id)
    assert execution is not None
    for written, data in enumerate((b"1", b"2"), 1):
        os.write(service.program(job).writes[0], data)
        while execution.live_record.now().stdout_bytes < written:  # noqa: ASYNC110
            await trio.sleep(0.001)
    await service.end(job)
    await log(service, "alice", job)
    await log(service, "alice", job, coalesce=False)
    for number, data in ((1, b"12"), (2, b"1")):
        chunk = await subscription(service, "alice", number).follower.receive()
        assert chunk is not None
        assert bytes(chunk.data) == data


async def test_log_has_the_last_lines_alone(service: CalledService) -> None:
    job = await service.run_to_its_end("alice", b"1\n2\n3\n")
    await log(service, "alice", job, tail_lines=1)
    chunk = await subscription(service, "alice").follower.receive()
    assert chunk is not None
    assert bytes(chunk.data) == b"3\n"


@pytest.mark.parametrize("seconds_ago", [None, 0, 3600])
@pytest.mark.parametrize("since_ago", [None, -3600, 3600])
async def test_of_two_times_the_later_one_counts(
    service: CalledService, since_ago: int | None, seconds_ago: int | None
) -> None:
    job = await service.run_to_its_end("alice", b"said\n")
    now = service.supervisor.now()
    since = None if since_ago is None else now - timedelta(seconds=since_ago)
    opened = await log(service, "alice", job, since=since, since_seconds=seconds_ago)
    given = [
        *([] if since is None else [since]),
        *([] if seconds_ago is None else [now - timedelta(seconds=seconds_ago)]),
    ]
    found = {start.since for start in opened.starts}
    if not given:
        assert opened.starts == ()
    else:
        for told in found:
            assert told is not None
            assert abs(told - max(given)) < timedelta(minutes=30)


async def test_log_resumes_by_the_starts_of_the_one_before(service: CalledService) -> None:
    job = await service.run("alice")
    later = service.supervisor.now() + timedelta(hours=1)
    opened = await log(service, "alice", job, since=later)
    assert {start.stream for start in opened.starts} == set(Stream)
    again = await log(service, "alice", job, offset=opened.offset, starts=opened.starts)
    assert again.starts == opened.starts
    assert {start.since for start in again.starts} == {later}


async def test_one_subscription_too_many_is_refused(service: CalledService) -> None:
    job = await service.run("alice")
    for _ in range(MAX_FOLLOWS):
        await log(service, "alice", job)
    with pytest.raises(TooManyFollows):
        await log(service, "alice", job)
    await log(service, "root", job)
    await service.call("alice", "job.unfollow", subscription=1)
    assert (await log(service, "alice", job)).subscription == MAX_FOLLOWS + 1


async def test_subscription_is_its_connections_own(service: CalledService) -> None:
    job = await service.run("alice")
    await log(service, "alice", job)
    with pytest.raises(InvalidParams, match="cannot find subscription 1"):
        await service.call("root", "job.credit", subscription=1, bytes=1)
    await service.call("root", "job.unfollow", subscription=1)
    assert subscription(service, "alice").record.id == job.id


# --- job.remove, job.prune ------------------------------------------------------------------


async def test_removal_tells_what_it_has_freed(service: CalledService) -> None:
    job = await service.run_to_its_end("alice", b"12345")
    removed = await service.call("alice", "job.remove", id=job.id)
    assert isinstance(removed, m.Removed)
    assert removed.jobs == (job.id,)
    assert removed.bytes > 5, "with its index"
    with pytest.raises(NotFound):
        await service.call("alice", "job.status", id=job.id)


async def test_live_job_is_removed_by_force_alone(service: CalledService) -> None:
    job = await service.run("alice")
    with pytest.raises(Busy, match="it has not ended") as refused:
        await service.call("alice", "job.remove", id=job.id)
    assert "--force" in refused.value.remedy
    assert service.program(job).exit is None
    removed = await service.call("alice", "job.remove", id=job.id, force=True)
    assert isinstance(removed, m.Removed)
    assert removed.jobs == (job.id,)
    assert await listed(service, "alice") == []


async def test_prune_takes_the_callers_own_output_alone(service: CalledService) -> None:
    bobs = await service.run_to_its_end("bob", b"12345")
    mine = await service.run_to_its_end("alice", b"12345")
    removed = await service.call("alice", "job.prune", keep_jobs=0)
    assert isinstance(removed, m.Removed)
    assert removed.jobs == (mine.id,)
    assert removed.bytes > 5
    assert (await service.supervisor.record(mine.id)).output_removed_at is not None
    assert (await service.supervisor.record(bobs.id)).output_removed_at is None
    removed = await service.call("root", "job.prune", keep_jobs=0)
    assert isinstance(removed, m.Removed)
    assert removed.jobs == (bobs.id,)


@pytest.mark.parametrize(
    ("params", "policy"),
    [
        ({}, None),
        ({"keep_jobs": 0}, RetentionPolicy(max_jobs=0)),
        ({"keep_bytes": 5}, RetentionPolicy(max_bytes=5)),
        ({"older_than_seconds": 7.0}, RetentionPolicy(max_age_seconds=7.0)),
    ],
)
async def test_prune_without_parameters_is_by_the_configuration(
    service: CalledService,
    monkeypatch: pytest.MonkeyPatch,
    params: dict[str, object],
    policy: RetentionPolicy | None,
) -> None:
    asked = list[object]()

    async def prune(_: Supervisor, *arguments: object) -> tuple[()]:
        await trio.lowlevel.checkpoint()
        asked.append(arguments)
        return ()

    monkeypatch.setattr(Supervisor, "prune", prune)
    for who in ("alice", "root"):
        removed = await service.call(who, "job.prune", **params)
        assert removed == m.Removed(jobs=(), bytes=0)
    assert asked == [(policy, "alice"), (policy, None)]


# --- volumes --------------------------------------------------------------------------------


async def test_volumes_are_made_listed_and_removed(service: CalledService) -> None:
    for name, thin in (("one", False), ("two", True)):
        made = await service.call("root", "volume.create", name=name, size_bytes=1 << 24, thin=thin)
        assert made == m.Nothing()
    both = (
        Volume(name="one", size_bytes=1 << 24),
        Volume(name="two", size_bytes=1 << 24, thin=True),
    )
    assert await service.call("root", "volume.list") == m.Volumes(volumes=both)
    assert await service.call("root", "volume.remove", name="one") == m.Nothing()
    assert await service.call("root", "volume.list") == m.Volumes(volumes=both[1:])
