"""Jobs as text: what is shown, and that nothing shown acts on a terminal."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from attrs import evolve

from jobworker.cli.worker_cli import render
from jobworker.errors import NotFound
from jobworker.model.job import (
    KILLED_FOR_MEMORY,
    LOSSES_UNKNOWN,
    LOST_WRITES,
    SERVICE_ENDED,
    JobId,
    JobRecord,
    JobSpec,
    JobStatus,
    Limits,
    OutputCut,
    Usage,
)
from jobworker.model.lifecycle import Reason, State

NOW = datetime(2026, 1, 31, 12, 0, 0, 987654, tzinfo=UTC)
RUNNING = JobStatus(
    id=JobId(7),
    spec=JobSpec(
        command=("echo", "a b"), limits=Limits(cpu_percent=50, memory_bytes=64 << 20, io_bps=0)
    ),
    owner="ann",
    state=State.RUNNING,
    created_at=NOW,
    started_at=NOW,
    usage=Usage(cpu_ns=1_240_000_000, memory_bytes=12 << 20, memory_peak_bytes=64 << 20),
)
OOM = evolve(
    RUNNING,
    state=State.FAILED,
    reason=Reason.OOM,
    signal=9,
    ended_at=NOW + timedelta(seconds=2),
)
EVIL = evolve(
    RUNNING,
    spec=JobSpec(command=("echo", "\x1b[2J\r\n\u202e\x9b")),
    owner="\x1b]0;x",
    detail="a\nStatus: COMPLETED",
)


def test_run_prints_this_form() -> None:
    assert render.started(RUNNING) == (
        "Job started:\n"
        "ID: 7\n"
        "Command: echo 'a b'\n"
        "Status: RUNNING\n"
        "StartTime: 2026-01-31T12:00:00Z\n"
        "Network: host"
    )


def test_status_tells_limits_and_usage() -> None:
    lines = render.status(RUNNING, NOW + timedelta(seconds=90)).splitlines()
    assert "Status: RUNNING" in lines
    assert "CPU: 1.2s used, limit 50%" in lines
    assert "Memory: 12.0 MiB now, 64.0 MiB peak, limit 64 MiB" in lines
    assert "IO: 0 B read, 0 B written, no limit" in lines
    assert "Duration: 1m30s" in lines


def test_status_tells_each_warning_on_a_line() -> None:
    lines = render.status(evolve(RUNNING, warnings=("the host is\nfull",)), NOW).splitlines()
    assert lines[-1] == r"Warning: the host is\x0afull"


def test_status_tells_how_a_job_ended() -> None:
    lines = render.status(OOM, NOW).splitlines()
    assert "Status: FAILED (oom)" in lines
    assert "Signal: 9 (SIGKILL)" in lines
    assert "Memory: 64.0 MiB peak, limit 64 MiB" in lines
    assert "Duration: 2.0s" in lines


@pytest.mark.parametrize(
    ("record", "lines"),
    [
        (OOM, ["job 7 was ended: it went over its memory limit of 64 MiB"]),
        (
            evolve(OOM, spec=evolve(OOM.spec, limits=Limits(memory_bytes=0))),
            ["job 7 was ended: it was killed for memory"],  # of a record that tells no more
        ),
        (
            evolve(OOM, spec=evolve(OOM.spec, limits=Limits())),
            ["job 7 was ended: it went over its memory limit"],
        ),
        (
            evolve(OOM, detail=f"its output was cut; it was {KILLED_FOR_MEMORY}: why"),
            [f"job 7 was ended: it was {KILLED_FOR_MEMORY}: why"],
        ),
        (
            evolve(RUNNING, state=State.COMPLETED, detail=f"1 was {KILLED_FOR_MEMORY}: why"),
            [f"job 7: 1 was {KILLED_FOR_MEMORY}: why"],
        ),
        (
            evolve(OOM, reason=Reason.TIMEOUT, spec=evolve(OOM.spec, timeout_seconds=90.0)),
            ["job 7 was ended: it ran longer than its time limit of 1m30s"],
        ),
        (
            evolve(OOM, reason=Reason.SIGNAL, signal=11),
            ["job 7 was ended by signal 11 (SIGSEGV)"],
        ),
        (evolve(OOM, reason=Reason.EXIT, exit_code=3), []),
        (evolve(RUNNING, state=State.COMPLETED), []),
        (
            evolve(RUNNING, state=State.COMPLETED, discarded_bytes=2048),
            ["job 7: 2.0 KiB of its output were not kept"],  # for a reason that nobody knows
        ),
        (
            evolve(RUNNING, discarded_bytes=2048, output_cut=OutputCut.LIMIT),
            ["job 7: 2.0 KiB of its output were not kept: it reached its limit on output"],
        ),
        (
            evolve(RUNNING, discarded_bytes=2048, output_cut=OutputCut.DISK),
            [
                "job 7: 2.0 KiB of its output were not kept: "
                "the server's disk is full, or refused to write"
            ],
        ),
        (evolve(RUNNING, state=State.STOPPED, signal=15), ["job 7 was stopped"]),
        (
            evolve(RUNNING, state=State.STOPPED, detail=f"a word; {SERVICE_ENDED}"),
            ["job 7 was stopped: its service ended"],
        ),
        (
            evolve(OOM, reason=Reason.DISK, exit_code=0, detail=f"it {LOST_WRITES}"),
            [f"job 7 ended with code 0, but cannot be trusted: it {LOST_WRITES}"],
        ),
        (
            evolve(OOM, reason=Reason.EXIT, exit_code=3, detail=f"it {LOST_WRITES}"),
            [f"job 7: it {LOST_WRITES}"],
        ),
        (
            evolve(RUNNING, state=State.COMPLETED, exit_code=0, detail=f"it {LOSSES_UNKNOWN}"),
            [f"job 7: it {LOSSES_UNKNOWN}"],
        ),
    ],
)
def test_end_is_explained_where_the_exit_code_does_not(record: JobRecord, lines: list[str]) -> None:
    assert render.ending(record) == lines


@pytest.mark.parametrize("detail", ["", "its launcher ended while the job was alive"])
def test_log_of_a_lost_job_says_that_its_end_may_be_missing(detail: str) -> None:
    lost = evolve(RUNNING, state=State.FAILED, reason=Reason.LOST, detail=detail)
    (line,) = render.losses(lost)
    assert line.startswith("job 7 was lost: its launcher ended while ")
    assert line.endswith("; the end of its output may be missing")
    assert render.losses(evolve(lost, discarded_bytes=5)) == [
        line,
        "job 7: 5 B of its output were not kept",
    ]
    assert render.losses(evolve(lost, reason=Reason.SIGNAL)) == []


def test_job_that_its_service_took_along_does_not_look_stopped_by_a_person() -> None:
    by_person = evolve(RUNNING, state=State.STOPPED, signal=15)
    by_service = evolve(by_person, detail=f"a word; {SERVICE_ENDED}")
    assert render.losses(by_service) == ["job 7 was stopped: its service ended"]
    assert render.outcome(by_service) == "job 7: STOPPED (service ended)"
    assert "  STOPPED (service ended)  " in render.table([by_service], NOW)
    assert render.losses(by_person) == []
    assert render.outcome(by_person) == "job 7: STOPPED"


@pytest.mark.parametrize(
    "text",
    [
        render.started(EVIL),
        render.status(EVIL, NOW),
        render.table([EVIL, RUNNING], NOW),
        "\n".join(render.ending(evolve(EVIL, reason=Reason.LOST, state=State.FAILED))),
    ],
)
def test_nothing_that_others_chose_acts_on_a_terminal(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "Status: COMPLETED" not in text.splitlines()


def test_table_is_aligned() -> None:
    other = evolve(RUNNING, id=JobId(1234), state=State.INITIALIZING, started_at=None)
    assert render.table([other, RUNNING], NOW + timedelta(seconds=1)).splitlines() == [
        "ID    STATUS        CREATED               DURATION  COMMAND",
        "1234  INITIALIZING  2026-01-31T12:00:00Z  -         echo 'a b'",
        "7     RUNNING       2026-01-31T12:00:00Z  1.0s      echo 'a b'",
    ]


def test_table_fits_a_terminal_and_ends_its_colours() -> None:
    long = evolve(RUNNING, spec=JobSpec(command=("x" * 200,)))
    for width in (10, 40, 80):
        line = render.table([long], NOW, width=width).splitlines()[1]
        assert len(line) == width
        coloured = render.table([long], NOW, width=width, colour=True).splitlines()[1]
        assert coloured.count("\x1b[") == 2
        assert coloured.replace("\x1b[32m", "").replace("\x1b[0m", "") == line


def test_command_line_in_a_table_stays_readable() -> None:
    long = evolve(RUNNING, spec=JobSpec(command=("sh", "-c", *(["x y"] * 3000))))
    line = render.table([long], NOW).splitlines()[1]
    assert line.endswith("…")
    assert len(line) < 300
    assert "sh -c 'x y' 'x y'" in line


def test_json_of_an_error_is_one_line_with_its_exit_code() -> None:
    line = render.error_as_json(NotFound("cannot\nfind", remedy="look"))
    assert "\n" not in line
    assert json.loads(line)["error"] == {
        "code": 1003,
        "name": "not_found",
        "message": "cannot\nfind",
        "remedy": "look",
        "exit_code": 66,
        "data": {},
    }
