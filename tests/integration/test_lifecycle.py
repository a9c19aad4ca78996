"""A job's life: start, end, stop, time-out, queue, restart; and what is left afterwards.

With JOBWORKER_SOAK set (`make soak`) a thousand jobs leave nothing, else some three hundred.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.sandbox.cgroup.files import groups_called
from jobworker.server.startup.preparation import instance_name

from ..services import open_embedded
from .conftest import child_of, children_of, disks_in, left_behind, settled, until
from .wire import Json, Refused, Wire, open_wire

EACH_OF_FOUR = 225 if os.environ.get("JOBWORKER_SOAK") else 50
"""So many jobs are run by each of four clients, one after the other."""


async def test_exit_code_and_signal_are_kept_apart(admin: Wire) -> None:
    _, _, job = await admin.run("sh", "-c", "exit 7")
    assert (job["state"], job["reason"], job["exit_code"], job["signal"]) == (
        *("FAILED", "exit", 7, None),
    )
    _, _, job = await admin.run("bash", "-c", "exec python3 -c 'import os; os.abort()'")
    assert (job["state"], job["reason"], job["exit_code"]) == ("FAILED", "signal", None)


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["nosuchprogram"], 1011, "nosuchprogram"),
        (["/usr/bin/nosuchprogram"], 1011, "nosuchprogram"),
        (["/etc/passwd"], 1012, "Permission denied"),
        (["/usr"], 1012, "Permission denied"),
    ],
)
async def test_program_that_cannot_start_is_told_and_recorded(
    admin: Wire, command: list[str], code: int, says: str
) -> None:
    with pytest.raises(Refused) as refused:
        await admin.start(*command)
    assert refused.value.code == code
    assert says in refused.value.message
    data = refused.value.data
    assert isinstance(data, dict)
    job = await admin.call("job.status", id=data["job"])
    assert (job["state"], job["reason"]) == ("FAILED", "start")
    assert job["exit_code"] == {1011: 127, 1012: 126}[code]


async def test_missing_directory_is_told_by_step(admin: Wire) -> None:
    with pytest.raises(Refused) as refused:
        await admin.start("true", workdir="/no/such")
    assert refused.value.code == 1010
    assert "change-directory" in refused.value.message
    assert "/no/such" in refused.value.message


async def test_stop_ends_all_that_ignore_and_daemonise(admin: Wire) -> None:
    marker = f"731{os.getpid()}"
    script = (
        "trap '' TERM\n"
        f"for i in 1 2 3; do setsid sh -c \"trap '' TERM; (sleep {marker} &) ; sleep {marker}\" & "
        "done\necho up\nwhile true; do sleep 1; done"
    )
    job = await admin.start("sh", "-c", script)
    await until(lambda: len(processes(f"sleep\0{marker}")) == 6)
    began = time.monotonic()
    with trio.fail_after(60):
        ended = await admin.call("job.stop", id=job, grace_seconds=0.7)
    seconds = time.monotonic() - began
    assert ended["state"] == "STOPPED"
    assert ended["signal"] == signal.SIGKILL
    assert seconds >= 0.7
    assert processes(f"sleep\0{marker}") == []


async def test_stop_lets_a_handler_run(admin: Wire) -> None:
    script = "trap 'echo bye; exit 3' TERM; echo up; while true; do sleep 0.05; done"
    result = await admin.call("job.run", job={"command": ["sh", "-c", script]}, follow={})
    notes = admin.notes(result["subscription"])
    assert (await notes.receive())["method"] == "job.output"
    job = result["job"]
    assert isinstance(job, dict)
    ended = await admin.call("job.stop", id=job["id"])
    assert (ended["state"], ended["exit_code"], ended["stdout_bytes"]) == ("STOPPED", 3, 7)


async def test_stop_of_what_would_not_notice_is_immediate(admin: Wire) -> None:
    job = await admin.start("sleep", "600")
    with trio.fail_after(60):
        ended = await admin.call("job.stop", id=job, grace_seconds=300)
    assert ended["state"] == "STOPPED"


async def test_stop_is_idempotent(admin: Wire) -> None:
    job = await admin.start("sleep", "600")
    first = await admin.call("job.stop", id=job)
    second = await admin.call("job.stop", id=job)
    assert first == second
    _, _, done = await admin.run("true")
    after = await admin.call("job.stop", id=done["id"])
    assert after["state"] == "COMPLETED"


async def test_signal_of_choice_is_delivered(admin: Wire) -> None:
    script = "trap 'echo usr1; exit 0' USR1; echo up; while true; do sleep 0.05; done"
    result = await admin.call("job.run", job={"command": ["sh", "-c", script]}, follow={})
    job = result["job"]
    assert isinstance(job, dict)
    notes = admin.notes(result["subscription"])
    await notes.receive()
    ended = await admin.call("job.stop", id=job["id"], signal="SIGUSR1")
    assert (ended["state"], ended["stdout_bytes"]) == ("STOPPED", len("up\nusr1\n"))
    with pytest.raises(Refused, match="no such signal"):
        await admin.call("job.stop", id=job["id"], signal="NOPE")


async def test_time_out_ends_a_job_and_says_so(admin: Wire) -> None:
    with trio.fail_after(60):
        _, _, job = await admin.run("sleep", "600", timeout_seconds=0.5)
    assert (job["state"], job["reason"]) == ("FAILED", "timeout")


async def test_wait_answers_at_the_end(admin: Wire) -> None:
    job = await admin.start("sh", "-c", "sleep 0.3; exit 5")
    ended = await admin.call("job.wait", id=job)
    assert (ended["state"], ended["exit_code"]) == ("FAILED", 5)


async def test_cancelled_client_does_not_end_its_job(service: EmbeddedService) -> None:
    async with open_wire(service) as first:
        job = await first.start("sleep", "0.6")
    async with open_wire(service) as second:
        ended = await second.call("job.wait", id=job)
    assert ended["state"] == "COMPLETED"


@pytest.mark.parametrize("method", ["job.status", "job.stop", "job.wait", "job.log"])
async def test_unknown_job_is_not_found(admin: Wire, method: str) -> None:
    with pytest.raises(Refused) as refused:
        await admin.call(method, id=999_999)
    assert refused.value.code == 1003


async def test_list_is_newest_first_and_pages(admin: Wire) -> None:
    made = [await admin.start("true") for _ in range(5)]
    listed = await admin.call("job.list", limit=3)
    assert ids(listed) == made[:-4:-1]
    listed = await admin.call("job.list", limit=2, before=made[2])
    assert ids(listed) == made[1::-1]
    for job in made:
        await admin.call("job.wait", id=job)
    listed = await admin.call("job.list", states=["COMPLETED"], limit=5)
    assert ids(listed) == made[::-1]


def ids(listed: Json) -> list[int]:
    jobs = listed["jobs"]
    assert isinstance(jobs, list)
    return [job["id"] for job in jobs]


def processes(words: str) -> list[str]:
    """Processes on the host whose command line begins with `words`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(words.encode()):
                found.append(process.name)
        except OSError:
            continue
    return found


async def test_jobs_beyond_the_bound_wait_in_order_and_then_are_refused(
    open_directory: Callable[[], Path],
) -> None:
    extra = {"worker": {"max_concurrent_jobs": 2, "max_waiting_jobs": 2}}
    async with open_embedded(open_directory(), extra) as service, open_wire(service) as wire:
        running = [await wire.start("sleep", "600") for _ in range(2)]
        waiting = [await wire.start("true") for _ in range(2)]
        states = [(await wire.call("job.status", id=job))["state"] for job in running + waiting]
        assert states == ["RUNNING", "RUNNING", "PENDING", "PENDING"]
        with pytest.raises(Refused) as refused:
            await wire.start("true")
        assert refused.value.code == 1004
        stopped = await wire.call("job.stop", id=waiting[0])
        assert (stopped["state"], stopped["started_at"]) == ("STOPPED", None)
        await wire.call("job.stop", id=running[0])
        ended = await wire.call("job.wait", id=waiting[1])
        assert ended["state"] == "COMPLETED"
        await wire.call("job.stop", id=running[1])


async def test_restart_keeps_history_output_and_ids(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    async with open_embedded(directory) as service, open_wire(service) as wire:
        _, _, before = await wire.run("echo", "kept")
        running = await wire.start("sleep", "600")
    assert left_behind(directory) == []
    async with open_embedded(directory) as service, open_wire(service) as wire:
        assert await wire.call("job.status", id=before["id"]) == {**before, "warnings": []}
        stopped = await wire.call("job.status", id=running)
        assert stopped["state"] == "STOPPED", "an orderly end stops what runs"
        assert stopped["detail"] == "its service ended"
        result = await wire.call("job.log", id=before["id"])
        out, err, job = await wire.output(result["subscription"])
        assert (out, err, job) == (b"kept\n", b"", before)
        assert await wire.start("true") == running + 1
    assert left_behind(directory) == []


async def test_killed_service_leaves_nothing_and_tells_what_was_lost(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    async with open_embedded(directory) as service, open_wire(service) as wire:
        seconds = f"7654321.{os.getpid()}"
        script = f"echo before; setsid sleep {seconds} & sleep {seconds}"
        result = await wire.call("job.run", job={"command": ["sh", "-c", script]}, follow={})
        job = result["job"]
        assert isinstance(job, dict)
        await wire.notes(result["subscription"]).receive()
        service.process.kill()
        await service.process.wait()
        # The launcher hears of it and takes the jobs along.
        await until(lambda: left_behind(directory) == [])
        assert processes(f"sleep\0{seconds}") == []
    async with open_embedded(directory) as service, open_wire(service) as wire:
        lost = await wire.call("job.status", id=job["id"])
        assert (lost["state"], lost["reason"]) == ("FAILED", "lost")
        result = await wire.call("job.log", id=job["id"])
        assert (await wire.output(result["subscription"]))[0] == b"before\n"
    assert service.log_text().count(f"job {job['id']}: FAILED (lost)") == 1


@pytest.mark.parametrize("inner", [True, False])
async def test_killed_launcher_ends_the_service_with_a_reason(
    open_directory: Callable[[], Path], inner: bool
) -> None:
    directory = open_directory()
    async with open_embedded(directory) as service, open_wire(service) as wire:
        await wire.start("sleep", seconds := f"7654322.{os.getpid()}")
        launcher = child_of(service.process.pid)
        os.kill(child_of(launcher) if inner else launcher, signal.SIGKILL)
        with trio.fail_after(20):
            await service.process.wait()
        assert service.process.returncode == 71
        assert "the launcher has ended; see its last lines above" in service.log_text()
        await until(lambda: processes(f"sleep\0{seconds}") == [])
    async with open_embedded(directory) as service, open_wire(service) as wire:
        await wire.run("true")
    assert left_behind(directory) == [], "the next launcher sweeps what a killed one left"


async def test_many_short_jobs_leave_nothing(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    async with open_embedded(directory) as service:
        service_pid = service.process.pid
        launcher_pid = child_of(child_of(service_pid))

        def standing() -> dict[str, int]:
            return {
                "service descriptors": len(os.listdir(f"/proc/{service_pid}/fd")),
                "launcher descriptors": len(os.listdir(f"/proc/{launcher_pid}/fd")),
                "children": len(children_of(launcher_pid)),
                "groups": sum(len(os.listdir(found)) for found in groups_called(own)),
                "mounts": len(Path(f"/proc/{launcher_pid}/mountinfo").read_text().splitlines()),
                "disks": len(disks_in(directory)),
            }

        own = instance_name(directory / "state")

        async def many(count: int) -> None:
            async with open_wire(service) as wire:
                for _ in range(count):
                    await wire.run("true")

        async def four_at_a_time(count: int) -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(many, count)

        await four_at_a_time(25)
        before = settled(standing)
        memory = resident_kib(service_pid)
        launcher_memory = resident_kib(launcher_pid)
        await four_at_a_time(EACH_OF_FOUR)
        with trio.move_on_after(60):
            while standing() != before:  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert standing() == before
        assert resident_kib(launcher_pid) - launcher_memory < 512
        assert resident_kib(service_pid) - memory < 8192
    assert left_behind(directory) == []


def resident_kib(pid: int) -> int:
    """Anonymous memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])
