"""The auditor: all of what counts is written, in order; a flood of what does not is bounded."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.errors import NotFound, PermissionDenied, UnknownMethod
from jobworker.jobs.history.audit import FILE, AuditRow, read_rows
from jobworker.jobs.history.history import History
from jobworker.model.job import JobId
from jobworker.pki.identity import Identity
from jobworker.protocol import messages as m
from jobworker.protocol.methods import METHODS
from jobworker.server.access.auditor import KIND_BURST, SUPPRESSED, VAIN_BURST, Auditor

from ...jobs.history.test_audit import room_for

EVE = Identity(common_name="eve", role="viewer", serial="0AB1", not_after=datetime.now(UTC))
PEER = "192.0.2.1:7"


def now() -> datetime:
    return datetime.now(UTC)


async def written(path: Path, act: object) -> list[AuditRow]:
    """What stands in the log after `act(auditor)`."""
    history = History.open(path)
    try:
        auditor = Auditor(history, now)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(auditor.serve)
            await trio.testing.wait_all_tasks_blocked()
            act(auditor)  # type: ignore[operator]
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
    finally:
        history.close()
    return read_rows(path, limit=100_000)


async def test_calls_that_count_are_noted_and_mere_looking_is_not(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    job = m.JobParams(id=JobId(7))

    def act(auditor: Auditor) -> None:
        auditor.called(EVE, PEER, METHODS["job.stop"], m.StopParams(id=JobId(7)), None)
        auditor.called(EVE, PEER, METHODS["job.status"], job, None)
        auditor.failed(EVE, PEER, METHODS["job.status"], job, NotFound("cannot find job 7"))
        auditor.failed(EVE, PEER, METHODS["job.stop"], job, PermissionDenied("cannot call"))
        auditor.refused(PEER, "the client sent no certificate")

    rows = await written(tmp_path / "history.db", act)
    assert [(row.name, row.action, row.job, row.outcome) for row in rows] == [
        ("eve", "job.stop", 7, "ok"),
        ("eve", "job.status", 7, "not_found"),
        ("eve", "job.stop", 7, "permission_denied"),
        ("", "connection.refused", None, "refused"),
    ]
    assert {row.peer for row in rows} == {PEER}
    assert rows[0].serial == "0AB1"
    lines = (tmp_path / FILE).read_text(encoding="ascii").splitlines()
    assert [line + "\n" for line in lines] == [row.line() for row in rows]


@pytest.mark.parametrize("outcome", ["refused", "denied"])
async def test_flood_is_bounded_and_counted(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, outcome: str
) -> None:
    def act(auditor: Auditor) -> None:
        for _ in range(5000):
            if outcome == "refused":
                auditor.refused(PEER, "no certificate")
            else:
                denied = PermissionDenied("cannot")
                auditor.failed(EVE, PEER, METHODS["job.stop"], m.StopParams(id=JobId(1)), denied)
        auditor.called(EVE, PEER, METHODS["job.stop"], m.StopParams(id=JobId(7)), None)

    rows = await written(tmp_path / "history.db", act)
    noted = [row for row in rows if row.action in ("connection.refused", "job.stop")]
    assert len(noted) <= VAIN_BURST + KIND_BURST + 2
    assert [row for row in rows if row.outcome == "ok"], "what counts was not lost in the flood"
    suppressed = [row for row in rows if row.action == SUPPRESSED]
    assert 1 <= len(suppressed) <= 2
    told = sum(int(row.detail.split()[0]) for row in suppressed)
    assert len(noted) - 1 + told == 5000


async def test_flood_of_strangers_hides_nobody(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    def act(auditor: Auditor) -> None:
        for _ in range(5000):
            auditor.refused(PEER, "no certificate")
        denied = PermissionDenied("cannot")
        auditor.failed(EVE, PEER, METHODS["job.stop"], m.StopParams(id=JobId(1)), denied)

    rows = await written(tmp_path / "history.db", act)
    assert [row.outcome for row in rows if row.name == "eve"] == ["permission_denied"]


async def test_flood_of_one_kind_hides_no_other_of_the_same_name(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A tenant's own refusals emptied its bucket, and what it tried then left no row."""
    denied, missing = PermissionDenied("cannot"), NotFound("cannot find")

    def act(auditor: Auditor) -> None:
        for job in range(1000, 3000):
            asked = m.JobParams(id=JobId(job))
            auditor.failed(EVE, PEER, METHODS["job.status"], asked, missing)
        auditor.failed(EVE, PEER, METHODS["job.stop"], m.StopParams(id=JobId(42)), denied)
        auditor.failed(EVE, PEER, METHODS["job.stop"], m.StopParams(id=JobId(43)), missing)
        auditor.malformed(EVE, PEER, UnknownMethod("cannot call 'job.pwn': no such method"))

    rows = await written(tmp_path / "history.db", act)
    tried = [(row.action, row.job, row.outcome) for row in rows if row.action != "job.status"]
    assert tried[:3] == [
        ("job.stop", 42, "permission_denied"),
        ("job.stop", 43, "not_found"),
        ("request.refused", None, "method_not_found"),
    ]


async def test_what_was_left_out_names_who_tried_what_and_upon_which_jobs(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    bob = evolve(EVE, common_name="bob", serial="0B0B")

    def act(auditor: Auditor) -> None:
        for job in range(1000, 3000):
            asked = m.JobParams(id=JobId(job))
            auditor.failed(EVE, PEER, METHODS["job.status"], asked, NotFound("cannot find"))
        for who in (EVE, bob):
            for _ in range(500):
                stop = m.StopParams(id=JobId(42))
                auditor.failed(who, PEER, METHODS["job.stop"], stop, PermissionDenied("cannot"))

    rows = await written(tmp_path / "history.db", act)
    left = {row.name: row for row in rows if row.action == SUPPRESSED}
    assert left.keys() == {"eve", "bob"}
    assert (left["bob"].serial, left["bob"].role, left["bob"].peer) == ("0B0B", bob.role, PEER)
    assert "job.stop (permission_denied)" in left["bob"].detail
    assert "job 42" in left["bob"].detail
    assert "job.status (not_found)" in left["eve"].detail
    assert "to 2999" in left["eve"].detail
    noted = [row for row in rows if row.action in ("job.stop", "job.status")]
    told = sum(int(row.detail.split()[0]) for row in rows if row.action == SUPPRESSED)
    assert len(noted) + told == 3000
    assert len(noted) < 300


REPEATED: list[tuple[str, object, object]] = [
    ("job.log", m.LogParams(id=JobId(7)), None),
    ("job.stop", m.StopParams(id=JobId(7)), None),
    ("job.prune", m.PruneParams(), m.Removed(jobs=(), bytes=0)),
]


@pytest.mark.parametrize(("method", "params", "result"), REPEATED)
async def test_repeated_call_that_changes_nothing_is_bounded_and_counted(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    method: str,
    params: object,
    result: object,
) -> None:
    def act(auditor: Auditor) -> None:
        for _ in range(2000):
            auditor.called(EVE, PEER, METHODS[method], params, result)
        auditor.called(EVE, PEER, METHODS["job.log"], m.LogParams(id=JobId(8)), None)

    rows = await written(tmp_path / "history.db", act)
    noted = [row for row in rows if row.outcome == "ok"]
    assert len(noted) == KIND_BURST + 1
    assert noted[-1].job == 8, "the first of each job is noted"
    told = [row.detail for row in rows if row.action == SUPPRESSED]
    assert sum(int(detail.split()[0]) for detail in told) == 2000 - KIND_BURST
    assert f"{method} (ok)" in told[0]


async def test_each_call_that_changes_something_is_noted(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    def act(auditor: Auditor) -> None:
        for number in range(300):
            removed = m.Removed(jobs=(JobId(number + 1),), bytes=1)
            auditor.called(EVE, PEER, METHODS["job.prune"], m.PruneParams(), removed)
            volume = m.VolumeParams(name="cache")
            auditor.called(EVE, PEER, METHODS["volume.remove"], volume, m.Nothing())

    rows = await written(tmp_path / "history.db", act)
    assert [row.action for row in rows] == ["job.prune", "volume.remove"] * 300


async def test_calls_about_too_many_jobs_are_bounded_as_vain_ones_are(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobworker.server.access.auditor.MAX_REPEATED", 10)

    def act(auditor: Auditor) -> None:
        for number in range(2000):
            log = m.LogParams(id=JobId(number % 1000 + 1))
            auditor.called(EVE, PEER, METHODS["job.log"], log, None)
        assert len(auditor._repeated) <= 10

    rows = await written(tmp_path / "history.db", act)
    assert len(rows) < 10 * KIND_BURST + VAIN_BURST + KIND_BURST + 3


async def test_rows_that_the_disk_refuses_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobworker.server.access.auditor.AGAIN_SECONDS", 0.02)
    path = tmp_path / "history.db"
    history = History.open(path)
    try:
        auditor = Auditor(history, now)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(auditor.serve)
            with room_for(1):
                auditor.service("one")
                with trio.fail_after(60):
                    while not auditor._refused:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                auditor.service("two")
                await trio.sleep(0.1)
            with trio.fail_after(60):
                while len(read_rows(path, limit=9)) < 2:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    finally:
        history.close()
    assert [row.action for row in read_rows(path, limit=9)] == ["one", "two"]
    assert (tmp_path / FILE).read_bytes().count(b"\n") == 2


async def test_names_forge_no_line(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    evil = 'x\n{"action":"job.run"}\u2028\u2029\x1b[2J\u202e'

    def act(auditor: Auditor) -> None:
        auditor.refused(PEER, evil)

    (row,) = await written(tmp_path / "history.db", act)
    assert row.detail == evil
    content = (tmp_path / FILE).read_bytes()
    assert content.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in content[:-1])


async def test_row_that_is_no_text_does_not_stop_the_others(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    def act(auditor: Auditor) -> None:
        auditor.refused(PEER, "a name of \udcff")
        auditor.service("after")
        params = m.StopParams(id=JobId(1))  # no integer of SQLite's:
        auditor.called(EVE, PEER, METHODS["job.stop"], params, {"job": 1 << 70})

    rows = await written(tmp_path / "history.db", act)
    assert [(row.action, row.detail) for row in rows] == [
        ("connection.refused", "a name of \\udcff"),
        ("after", ""),
    ]
    lines = (tmp_path / FILE).read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["connection.refused", "after"]


async def test_rows_are_found_by_time_name_and_job(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    history = History.open(path)
    start = datetime(2026, 1, 31, 12, tzinfo=UTC)
    await history.add_audit_rows(
        [
            AuditRow(at=start + timedelta(minutes=n), name=name, action="x", job=n, outcome="ok")
            for n, name in enumerate(["eve", "bob", "eve"])
        ]
    )
    try:
        assert [row.job for row in read_rows(path, name="eve", limit=10)] == [0, 2]
        assert [row.job for row in read_rows(path, job=1, limit=10)] == [1]
        since = start + timedelta(minutes=1)
        assert [row.job for row in read_rows(path, since=since, limit=10)] == [1, 2]
        assert [row.job for row in read_rows(path, limit=2)] == [1, 2]
    finally:
        history.close()
