"""SIGKILL of the service, at random instants and at every transition of a job: nothing is lost.

JOBWORKER_SOAK=1 (`make soak`) makes it two hundred rounds. JOBWORKER_SEED repeats a run.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from attrs import Factory, define

from jobworker.client.client import Client
from jobworker.errors import ConnectionFailed, JobworkerError, NotFound
from jobworker.model.job import JobId, JobRecord, JobSpec, Stream
from jobworker.model.lifecycle import Reason, State

from ..integration.conftest import (
    _needs_root,
    child_of,
    children_of,
    left_behind,
    open_directory,
    settled,
)
from .crash_points import POINTS
from .restarting import Site, open_site

__all__ = ["_needs_root", "open_directory"]

SOAK = bool(os.environ.get("JOBWORKER_SOAK"))
ROUNDS = 200 if SOAK else 4
JOBS = 20
EXTRA: dict[str, dict[str, object]] = {
    "worker": {"max_concurrent_jobs": 60, "stop_grace": "60s"},
    "sandbox": {"disk_limit": 16},
}

WRITER = """
trap 'end=1' TERM
i=0
while [ -z "$end" ]; do
    for _ in 1 2 3 4 5 6; do echo "o $i"; echo "e $i" >&2; i=$((i+1)); done
    sleep 0.03
done
echo "end $i"; echo "end $i" >&2
exit 7
"""


@define(eq=False)
class Followed:
    """What a follower of one job has got, and that it came without gap or repeat."""

    job: JobId
    offset: int = 0
    data: dict[Stream, bytearray] = Factory(lambda: {each: bytearray() for each in Stream})

    async def follow(self, client: Client) -> None:
        """Follow to the end, over as many services as it takes."""
        async for chunk in client.job(self.job).output():
            assert chunk.offset == self.offset, "a gap or a repeat"
            self.offset += len(chunk.data)
            self.data[chunk.stream] += chunk.data

    def check(self) -> int:
        """Every record is there, once and in order: how many."""
        counts = set()
        for stream, letter in ((Stream.STDOUT, "o"), (Stream.STDERR, "e")):
            *records, end = self.data[stream].decode().splitlines()
            assert records == [f"{letter} {n}" for n in range(len(records))]
            assert end == f"end {len(records)}"
            counts.add(len(records))
        (count,) = counts
        return count


async def start(client: Client, script: str, name: str = "") -> JobId:
    job = await client.run(JobSpec(command=("sh", "-c", script), name=name))
    return job.id


async def keep_running_short_jobs(client: Client, given: list[JobId]) -> None:
    """Start jobs that end at once, whatever becomes of the service: the ids that were told."""
    while True:
        try:
            given.append(await start(client, "exit 3"))
        except (ConnectionFailed, JobworkerError):
            await trio.sleep(0.05)


async def come_and_go(client: Client, jobs: list[JobId], dice: random.Random) -> None:
    """Follow from the start, and vanish in the midst of it."""
    while True:
        follower = Followed(dice.choice(jobs))
        with trio.move_on_after(dice.uniform(0.0, 0.5)):
            await follower.follow(client)


@pytest.mark.timeout(3600 if SOAK else 180)
async def test_killed_at_random_instants_nothing_is_lost(
    open_directory: Callable[[], Path],
) -> None:
    usual = random.SystemRandom().randrange(1 << 30) if SOAK else 1
    seed = int(os.environ.get("JOBWORKER_SEED", usual))
    print(f"JOBWORKER_SEED={seed}")  # noqa: T201 - shown where it fails
    dice = random.Random(seed)
    directory, given = open_directory(), list[JobId]()
    with open_site(directory, EXTRA) as site:
        site.start()
        await site.until_ready()
        async with site.client() as client:
            jobs = [await start(client, WRITER) for _ in range(JOBS)]
            followed = [Followed(job) for job in jobs]
            async with trio.open_nursery() as followers:
                for each in followed:
                    followers.start_soon(each.follow, client)
                async with trio.open_nursery() as crowd:
                    crowd.start_soon(keep_running_short_jobs, client, given)
                    crowd.start_soon(come_and_go, client, jobs, dice)
                    for _ in range(ROUNDS):
                        if dice.random() < 0.7:  # else in the midst of its start
                            await site.until_ready()
                        await trio.sleep(dice.uniform(0.0, 0.6))
                        await site.kill()
                        site.start()
                    crowd.cancel_scope.cancel()
                await site.until_ready()
                async with trio.open_nursery() as stops:
                    for job in jobs:
                        stops.start_soon(stop, client, job)
            records = [each.check() for each in followed]
            assert min(records) > 0
            for each in followed:
                await check_log(client, each)
            await check_history(client, jobs, given)
        await site.end()
    assert left_behind(directory) == []


async def stop(client: Client, job: JobId) -> None:
    record = await client.job(job).stop()
    assert (record.state, record.exit_code, record.discarded_bytes) == (State.STOPPED, 7, 0)


async def check_log(client: Client, followed: Followed) -> None:
    """Who reads the log now gets the same, and records count the same."""
    again = Followed(followed.job)
    await again.follow(client)
    assert again.data == followed.data
    record = await client.job(followed.job).status()
    assert record.stdout_bytes + record.stderr_bytes == followed.offset


async def check_history(client: Client, jobs: list[JobId], given: list[JobId]) -> None:
    """Every id was told once and is known; nothing is said to be alive; codes are true."""
    assert len({*jobs, *given}) == len(jobs) + len(given), "an id was given twice"
    everything: list[JobRecord] = []
    while page := await client.list(before=everything[-1].id if everything else None, limit=500):
        everything.extend(page)
    known = {record.id: record for record in everything}
    assert known.keys() >= {*jobs, *given}
    for record in everything:
        if record.id not in jobs:
            if record.reason is Reason.LOST:  # killed in the midst of its start
                assert record.started_at is None, record
            else:
                assert (record.reason, record.exit_code) == (Reason.EXIT, 3), record


# --- every transition ---------------------------------------------------------------------------

VICTIM = "echo one; echo two >&2; sleep 0.3; echo three; exit 7"
STUBBORN = "trap '' TERM; echo one; echo two >&2; while :; do sleep 1; done"
UNKNOWN, LOST, WHOLE, STOPPED = "unknown", "lost", "whole", "stopped"
OUTCOMES = {
    "before the admission is recorded": {UNKNOWN, LOST, WHOLE},  # by its note, if it has one
    "after the admission is recorded": {LOST, WHOLE},
    "before the start": {UNKNOWN, LOST},
    "after the start": {WHOLE},
    "after the signal of a stop": {STOPPED},
}


def standing(site: Site) -> tuple[int, int, int]:
    """What the launcher has open and below it, and what stands on the jobs' disk."""
    pid = child_of(site.launcher)
    scratch = len(os.listdir(site.directory / "state" / "scratch"))
    return len(os.listdir(f"/proc/{pid}/fd")), len(children_of(pid)), scratch


async def crash(site: Site, client: Client, point: str) -> JobId | None:
    """Have the service kill itself at `point` of a victim's life: the id, where it was told."""
    told = None
    try:
        if "stop" in point:
            told = await start(client, STUBBORN, point)
            await client.job(told).stop()
        else:
            told = await start(client, VICTIM, point)
            await trio.sleep_forever()
    except JobworkerError:
        await site.until_dead()
    return told


async def outcome(client: Client, job: JobId) -> str:
    """What became of a victim: its log is whole where it came to its end."""
    try:
        record: JobRecord = await client.job(job).status()
    except NotFound:
        return UNKNOWN
    if record.reason is Reason.LOST:
        return LOST
    if not record.ended and "trap" in record.spec.command[2]:
        record = await client.job(job).stop(grace_seconds=0)
    record = await client.job(job).wait()
    got = Followed(job)
    await got.follow(client)
    if record.state is State.STOPPED:
        assert got.data == {Stream.STDOUT: b"one\n", Stream.STDERR: b"two\n"}
        return STOPPED
    assert got.data == {Stream.STDOUT: b"one\nthree\n", Stream.STDERR: b"two\n"}
    assert (record.state, record.reason, record.exit_code) == (State.FAILED, Reason.EXIT, 7)
    assert (record.stdout_bytes, record.stderr_bytes) == (10, 4)
    return WHOLE


@pytest.mark.timeout(300)
async def test_killed_at_every_transition_of_a_job_nothing_is_lost_or_left(
    open_directory: Callable[[], Path],
) -> None:
    directory, before, victim = open_directory(), None, JobId(0)
    points = list(POINTS)
    with open_site(directory, EXTRA) as site:
        for point, next_point in zip(["", *points], [*points, ""], strict=True):
            site.start(*([next_point, next_point] if next_point else []))
            await site.until_ready()
            async with site.client(patience_seconds=0) as client:
                if point:
                    came = await outcome(client, victim)
                    assert came in OUTCOMES.get(point, {WHOLE}), (point, came)
                last = await start(client, "true")
                await client.job(last).wait()
                assert last == victim + 1, "no id is given twice, known or not"
                before = before or settled(lambda: standing(site))
                with trio.move_on_after(60):
                    while standing(site) != before:  # noqa: ASYNC110
                        await trio.sleep(0.02)
                assert standing(site) == before, point
                if not next_point:
                    break
                victim = JobId(last + 1)
                with trio.move_on_after(30) as patience, trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(cancel_when_dead, site, scope)
                        told = await crash(site, client, next_point)
                        assert told in (None, victim), next_point
                        nursery.cancel_scope.cancel()
                assert not patience.cancelled_caught, next_point
            await site.until_dead()
            assert site.process is not None
            assert site.process.returncode == -9, (next_point, site.log_text())
        await site.end()
    assert left_behind(directory) == []


async def cancel_when_dead(site: Site, scope: trio.CancelScope) -> None:
    await site.until_dead()
    scope.cancel()
