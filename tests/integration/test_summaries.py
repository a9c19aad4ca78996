"""Lists and ends carry summaries, whatever a job's request holds; `job.status` tells all of it."""

import json
import time

import pytest
import trio

from .wire import Json, Wire

VARIABLES = {f"VARIABLE_{number}": "x" * 10 for number in range(20_000)}
COMMAND = ["sh", "-c", "read line; echo end", *(f"argument {n}" for n in range(10_000))]
LABELS = {f"label-{n}": "v" * 200 for n in range(40)}


def is_summary(job: object) -> bool:
    assert isinstance(job, dict)
    spec = job["spec"]
    assert job["abridged"] == ["command", "environment", "labels", "secret_environment"]
    assert spec["environment"] == spec["secret_environment"] == {}
    assert spec["command"][:3] == COMMAND[:3]
    assert spec["command"][-1].endswith("…")
    return len(json.dumps(job)) < 8000


def is_whole(job: Json, *, masked: bool = False) -> bool:
    assert job["abridged"] == []
    spec = job["spec"]
    assert isinstance(spec, dict)
    assert spec["command"] == COMMAND
    assert spec["secret_environment"] == {"SECRET": "***"}
    assert spec["labels"] == LABELS
    return bool(spec["environment"] == (dict.fromkeys(VARIABLES, "***") if masked else VARIABLES))


async def start_large(admin: Wire) -> Json:
    job = {
        "command": COMMAND,
        "environment": VARIABLES,
        "secret_environment": {"SECRET": "hunter2"},
        "labels": LABELS,
        "name": "large",
    }
    return await admin.call("job.run", job=job)


async def test_everything_but_status_tells_a_summary(admin: Wire, viewer: Wire) -> None:
    job = (await start_large(admin))["job"]
    assert is_summary(job)
    number = job["id"]  # type: ignore[index]
    live = await admin.call("job.list", name="large", limit=1)
    assert is_summary(live["jobs"][0])  # type: ignore[index]
    assert is_whole(await admin.call("job.status", id=number))
    assert is_whole(await viewer.call("job.status", id=number), masked=True)
    followed = await admin.call("job.log", id=number)
    assert is_summary(await admin.call("job.stop", id=number, grace_seconds=0))
    assert is_summary((await admin.output(followed["subscription"]))[2])
    assert is_summary(await admin.call("job.wait", id=number))
    for wire in (admin, viewer):
        ended = await wire.call("job.list", labels={"label-39": "v" * 200}, limit=1)
        assert is_summary(ended["jobs"][0])  # type: ignore[index]
    assert is_whole(await admin.call("job.status", id=number))
    assert is_whole(await viewer.call("job.status", id=number), masked=True)
    await admin.call("job.remove", id=number)
    assert (await admin.call("job.list", name="large", limit=1))["jobs"] == []


async def test_status_of_live_and_ended_job_says_the_same(admin: Wire) -> None:
    number = (await start_large(admin))["job"]["id"]  # type: ignore[index]
    live = await admin.call("job.status", id=number)
    await admin.call("job.stop", id=number, grace_seconds=0)
    ended = await admin.call("job.status", id=number)
    assert ended["spec"] == live["spec"]
    assert ended.keys() == live.keys()


@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_pages_of_live_and_ended_jobs_join_without_gap_or_repeat(
    admin: Wire, limit: int
) -> None:
    name = f"pages-{time.time_ns()}"
    jobs = []
    for number in range(10):
        command = ["sleep", "600"] if number % 3 == 0 else ["true"]
        jobs.append(await admin.start(*command, name=name))
        if number % 3:
            await admin.call("job.wait", id=jobs[-1])
    seen: list[object] = []
    before = None
    with trio.fail_after(20):
        while True:
            page = await admin.call("job.list", name=name, limit=limit, before=before)
            seen += [job["id"] for job in page["jobs"]]  # type: ignore[attr-defined]
            before = page["next"]
            if before is None:
                break
    assert seen == sorted(jobs, reverse=True)
    for number in jobs[::3]:
        await admin.call("job.stop", id=number, grace_seconds=0)
