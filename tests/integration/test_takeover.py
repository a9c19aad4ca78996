"""A service that is killed, restarted or told to leave, while its launcher and its jobs go on."""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import apsw
import pytest
import trio
import trio.testing

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.sandbox.service.launch import connect_launcher
from jobworker.server.host.descriptor_budget import OWN

from ..security.raw_socket import open_raw
from ..services import open_embedded, write_configuration
from .conftest import left_behind, locked_history, until
from .outside import open_launcher, settings_with
from .test_cli import Cli
from .test_outside_launcher import spawn
from .wire import Json, Refused, Wire, open_wire

Settings = Mapping[str, Mapping[str, object]]

COUNTER = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done"


@asynccontextmanager
async def serving(directory: Path, extra: Settings | None = None) -> AsyncIterator[EmbeddedService]:
    """A service of the launcher that runs in `directory`."""
    async with open_embedded(directory, settings_with(directory, extra or {})) as service:
        yield service


async def kill(service: EmbeddedService) -> None:
    service.process.kill()
    await service.process.wait()


async def start(wire: Wire, script: str, **spec: object) -> int:
    return await wire.start("sh", "-c", script, **spec)


async def log_of(wire: Wire, job: int) -> tuple[bytes, Json]:
    result = await wire.call("job.log", id=job)
    out, _, record = await wire.output(result["subscription"])
    return out, record


async def size_of(wire: Wire, job: int) -> int:
    size = (await wire.call("job.status", id=job))["stdout_bytes"]
    assert isinstance(size, int)
    return size


async def until_bigger(wire: Wire, job: int, size: int) -> None:
    with trio.fail_after(20):
        while await size_of(wire, job) <= size:  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_killed_service_loses_no_job_and_no_byte(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, COUNTER)
            brief = await start(wire, "read x </dev/null; exit 7")
            await until_bigger(wire, job, 20)
            before = await wire.call("job.status", id=job)
            await kill(service)
        async with serving(directory) as service, open_wire(service) as wire:
            after = await wire.call("job.status", id=job)
            assert (after["state"], after["started_at"]) == ("RUNNING", before["started_at"])
            await until_bigger(wire, job, int(str(after["stdout_bytes"])))
            ended = await wire.call("job.wait", id=brief)
            assert (ended["state"], ended["exit_code"]) == ("FAILED", 7)
            await wire.call("job.stop", id=job)
            data, record = await log_of(wire, job)
            assert data.decode().split() == [str(n) for n in range(len(data.split()))]
            assert record["state"] == "STOPPED"
            assert await start(wire, "true") == brief + 1, "ids go on"
    assert left_behind(directory) == []


async def test_more_than_a_pipe_holds_waits_for_the_next_service(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    size, marker = 5_000_000 + os.getpid(), f"marker-{os.getpid()}-"
    script = f"trap go=1 USR1; echo up; while [ -z $go ]; do sleep 0.05; done; : {marker}; "
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, f"{script} head -c {size} /dev/zero; exit 3")
            await until_bigger(wire, job, 0)
            await kill(service)
        os.kill(first_of(marker), signal.SIGUSR1)
        await until(lambda: writers_that_wait(size) or not processes(marker))
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=job)
            assert (ended["stdout_bytes"], ended["exit_code"]) == (len("up\n") + size, 3)
    assert left_behind(directory) == []


def processes(words: str) -> list[int]:
    """Processes of this host whose command line holds `words`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if words.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def first_of(words: str) -> int:
    """The one of them that has forked the others: those have its words until they execute."""
    parents = {}
    for pid in processes(words):
        with suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    (first,) = (pid for pid, parent in parents.items() if parent not in parents)
    return first


def writers_that_wait(size: int) -> list[int]:
    """Those that write so many zeros and wait for room in the pipe."""
    found = []
    for pid in processes(f"head\0-c\0{size}\0"):
        with suppress(OSError):
            if "pipe" in Path(f"/proc/{pid}/wchan").read_text():
                found.append(pid)
    return found


async def test_service_that_is_told_to_end_leaves_jobs_to_the_next(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    one: Settings = {"worker": {"max_concurrent_jobs": 1}}
    with open_launcher(directory):
        async with serving(directory, one) as service, open_wire(service) as wire:
            running = await start(wire, COUNTER)
            waiting = await start(wire, "echo $JOBWORKER_JOB_ID; exit 4")
        assert service.process.returncode == 0
        assert f"job {running}: left to the launcher" in service.log_text()
        assert f"job {waiting}: left to the next service" in service.log_text()
        async with serving(directory, one) as service, open_wire(service) as wire:
            states = [(await wire.call("job.status", id=n))["state"] for n in (running, waiting)]
            assert states == ["RUNNING", "PENDING"]
            await wire.call("job.stop", id=running)
            ended = await wire.call("job.wait", id=waiting)
            assert (ended["exit_code"], (await log_of(wire, waiting))[0]) == (4, b"2\n")
    assert left_behind(directory) == []


async def end_with_clients(service: EmbeddedService, wire: Wire, job: int) -> float:
    """End the service while a client waits and follows: the seconds that it took."""
    await wire.call("job.log", id=job, follow=True)
    async with trio.open_nursery() as nursery:

        async def ask(method: str) -> None:
            with pytest.raises(Refused, match="is left to the next service"):
                await wire.call(method, id=job)

        nursery.start_soon(ask, "job.wait")
        await trio.testing.wait_all_tasks_blocked()
        await wire.call("job.status", id=job)  # what came before is being served
        service.process.terminate()
        before = trio.current_time()
        await service.process.wait()
        return trio.current_time() - before
    raise AssertionError("unreachable")


async def quickest(end: Callable[[], Awaitable[float]], most_seconds: float) -> float:
    """The seconds that an end took: of several, where a busy host makes one take longer."""
    seconds = await end()
    for _ in range(9):
        if seconds < most_seconds:
            break
        seconds = min(seconds, await end())
    return seconds


async def test_clients_that_wait_do_not_hold_up_the_end(
    open_directory: Callable[[], Path],
) -> None:
    """They are told what becomes of the job and of the service; one that is silent is cut off."""
    directory = open_directory()

    async def with_idle_one() -> float:
        async with (
            serving(directory) as service,
            open_wire(service) as wire,
            open_wire(service) as idle,
        ):
            seconds = await end_with_clients(service, wire, await start(wire, COUNTER))
            for each in (wire, idle):
                assert each.socket.closed is not None
                assert each.socket.closed.code == 1001
                assert str(each.socket.closed.reason).startswith("shutting_down: ")
            return seconds

    async def with_silent_one() -> float:
        async with (
            serving(directory) as service,
            open_wire(service) as wire,
            open_raw(service),  # answers nothing, not the closing frame either
        ):
            return await end_with_clients(service, wire, await start(wire, COUNTER))

    with open_launcher(directory):
        assert await quickest(with_idle_one, 0.9) < 0.9
        assert await quickest(with_silent_one, 2) < 2
    assert left_behind(directory) == []


async def test_jobs_are_stopped_where_that_is_the_policy(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    stop: Settings = {"worker": {"jobs_on_exit": "stop"}}
    with open_launcher(directory):
        async with serving(directory, stop) as service, open_wire(service) as wire:
            job = await start(wire, "exec sleep 600")
        async with serving(directory) as service, open_wire(service) as wire:
            assert (await wire.call("job.status", id=job))["state"] == "STOPPED"
    assert left_behind(directory) == []


async def test_stop_that_a_kill_cut_short_is_seen_to_its_end(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    script = "trap 'echo told' TERM; echo up; while :; do read x < /dev/zero; done"
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, script)
            await until_bigger(wire, job, 0)
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    with pytest.raises(trio.EndOfChannel):
                        await wire.call("job.stop", id=job, grace_seconds=3)

                nursery.start_soon(stop)
                with trio.fail_after(20):
                    while not await is_recorded(directory, job, '"stop_requested_at":"'):  # noqa: ASYNC110
                        await trio.sleep(0.02)
                await kill(service)
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=job)
            assert (ended["state"], ended["signal"]) == ("STOPPED", signal.SIGKILL)
    assert left_behind(directory) == []


async def test_policy_at_the_limit_of_output_and_what_was_lost_outlive_a_kill(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    script = "trap '' TERM; head -c 3000000 /dev/zero; while :; do echo x; sleep 0.05; done"
    grace: Settings = {"worker": {"stop_grace": "6s"}}
    with open_launcher(directory):
        async with serving(directory, grace) as service, open_wire(service) as wire:
            job = await start(wire, script, limits={"output_bytes": 50_000}, at_max_output="stop")
            with trio.fail_after(20):
                while not await is_recorded(directory, job, '"output_cut":"limit"'):  # noqa: ASYNC110
                    await trio.sleep(0.02)
                while (await lost_of(wire, job)) < 2_900_000:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            await kill(service)
        async with serving(directory) as service, open_wire(service) as wire:
            with trio.fail_after(20):
                ended = await wire.call("job.wait", id=job)
            assert (ended["state"], ended["reason"]) == ("FAILED", "output")
            assert (ended["signal"], ended["output_cut"]) == (signal.SIGKILL, "limit")
            assert str(ended["detail"]).count("reached the limit of 48.8 KiB") == 1
            assert await lost_of(wire, job) > 1_400_000
    assert left_behind(directory) == []


@pytest.mark.parametrize("stopping", [False, True])
async def test_what_was_discarded_counts_as_much_after_a_clean_restart(
    open_directory: Callable[[], Path], stopping: bool
) -> None:
    """Also what neither index nor history was told of so far, since it is not twice as much."""
    directory, marker = open_directory(), f"marker-{os.getpid()}-"
    wait = "while [ -z $go ]; do sleep 0.02; done; go="
    write = f"head -c 2000 /dev/zero; {wait}; head -c 500 /dev/zero; {wait}"
    script = f"trap '' TERM; trap go=1 USR1; : {marker}; {write}; exit 3"
    grace: Settings = {"worker": {"stop_grace": "1s"}}
    limited: dict[str, object] = {
        "limits": {"output_bytes": 1000},
        "at_max_output": "discard-output",
    }

    async def until_lost(wire: Wire, job: int, count: int) -> None:
        with trio.fail_after(20):
            while await lost_of(wire, job) != count:  # noqa: ASYNC110
                await trio.sleep(0.02)

    with open_launcher(directory):
        async with serving(directory, grace) as service, open_wire(service) as wire:
            job = await start(wire, script, **limited)
            await until_lost(wire, job, 1000)
            pid = first_of(marker)
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    with pytest.raises((trio.EndOfChannel, Refused)):
                        await wire.call("job.stop", id=job, grace_seconds=300)

                if stopping:
                    nursery.start_soon(stop)
                    with trio.fail_after(20):
                        while not await is_recorded(directory, job, '"stop_requested_at":"'):  # noqa: ASYNC110
                            await trio.sleep(0.02)
                os.kill(pid, signal.SIGUSR1)
                await until_lost(wire, job, 1500)
                service.process.send_signal(signal.SIGTERM)
                await service.process.wait()
        async with serving(directory) as service, open_wire(service) as wire:
            assert await lost_of(wire, job) == 1500
            os.kill(pid, signal.SIGUSR1)
            ended = await wire.call("job.wait", id=job)
            assert (ended["exit_code"], ended["discarded_bytes"]) == (3, 1500)
    assert left_behind(directory) == []


async def test_job_that_is_refused_while_the_service_ends_is_not_left_to_the_next(
    open_directory: Callable[[], Path],
) -> None:
    """Another program has locked the history for too long; the job runs already."""
    directory, marker = open_directory(), f"marker-{os.getpid()}-"
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            with locked_history(directory) as history:
                async with trio.open_nursery() as nursery:

                    async def run() -> None:
                        with pytest.raises(Refused, match="another program has locked it"):
                            await start(wire, f"sleep 600; : {marker}")
                        history.execute("ROLLBACK")

                    nursery.start_soon(run)
                    await until(lambda: processes(marker))
                    service.process.send_signal(signal.SIGTERM)
            with trio.fail_after(40):
                await service.process.wait()
            assert processes(marker) == []
        async with serving(directory) as service, open_wire(service) as wire:
            assert (await wire.call("job.list"))["jobs"] == []
    assert left_behind(directory) == []


async def lost_of(wire: Wire, job: int) -> int:
    lost = (await wire.call("job.status", id=job))["discarded_bytes"]
    assert isinstance(lost, int)
    return lost


async def is_recorded(directory: Path, job: int, words: str) -> bool:
    path = directory / "state" / "service" / "history.db"
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        (text,) = next(connection.execute("SELECT record FROM jobs WHERE id = ?", (job,)))
    finally:
        connection.close()
    return words in str(text)


async def test_time_out_counts_from_the_start_of_the_job(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, "exec sleep 600", timeout_seconds=2)
            await kill(service)
        await trio.sleep(2)
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=job)
            assert (ended["state"], ended["reason"]) == ("FAILED", "timeout")
    assert left_behind(directory) == []


async def test_job_that_the_history_does_not_know_is_adopted_and_its_id_not_given_again(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        opened = connect_launcher(str(directory / "launcher.sock"))
        opened.sock.settimeout(20)
        stdout, stderr = spawn(opened.sock, 41, "sh", "-c", "echo here; exec sleep 600")
        opened.close()
        os.close(stdout)
        os.close(stderr)
        async with serving(directory) as service, open_wire(service) as wire:
            await until_bigger(wire, 41, 0)
            record = await wire.call("job.status", id=41)
            assert (record["state"], record["owner"]) == ("RUNNING", "")
            assert (await wire.call("job.stop", id=41))["state"] == "STOPPED"
            assert (await log_of(wire, 41))[0] == b"here\n"
            assert await start(wire, "true") == 42
    assert left_behind(directory) == []


async def test_job_that_the_launcher_does_not_have_is_lost(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory) as launcher:
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, "echo kept; exec sleep 600")
            await until_bigger(wire, job, 0)
            launcher.kill()
            with trio.fail_after(20):
                await service.process.wait()
            assert service.process.returncode == 71
            why = "the launcher has ended; see the reason in the log of `worker launcher`"
            assert why in service.log_text()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            data, record = await log_of(wire, job)
            assert (record["state"], record["reason"], data) == ("FAILED", "lost", b"kept\n")
            cli, why = Cli(service), "its launcher ended while the job was alive"
            note = f"job {job} was lost: {why}; the end of its output may be missing"
            for options in ([], ["-f"]):
                done = await trio.to_thread.run_sync(partial(cli, "log", *options, str(job)))
                assert (done.stdout, done.stderr) == ("kept\n", f"{note}\n")
            done = await trio.to_thread.run_sync(partial(cli, "status", str(job)))
            assert {"Status: FAILED (lost)", f"Detail: {why}"} <= {*done.stdout.splitlines()}
    assert left_behind(directory) == []


async def test_job_whose_output_is_gone_goes_on_and_says_so(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, "exec sleep 600")
            await kill(service)
        for path in (directory / "state" / "service" / "spool" / str(job)).iterdir():
            path.unlink()
        async with serving(directory) as service, open_wire(service) as wire:
            record = await wire.call("job.status", id=job)
            assert record["state"] == "RUNNING"
            assert "missing" in str(record["detail"])
            await wire.call("job.stop", id=job)
    assert left_behind(directory) == []


async def test_waiting_jobs_survive_a_kill_with_a_launcher_of_the_services_own(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    one: Settings = {"worker": {"max_concurrent_jobs": 1}}
    async with open_embedded(directory, one) as service, open_wire(service) as wire:
        running = await start(wire, "exec sleep 600")
        waiting = await start(wire, "exit 9")
        await kill(service)
    async with open_embedded(directory, one) as service, open_wire(service) as wire:
        assert (await wire.call("job.status", id=running))["reason"] == "lost"
        assert (await wire.call("job.wait", id=waiting))["exit_code"] == 9
    assert left_behind(directory) == []


def failed_start(directory: Path, extra: Settings, descriptors: int) -> str:
    """Start a service with so many descriptors, which refuses: what it says."""
    config = write_configuration(directory, settings_with(directory, extra))
    done = subprocess.run(
        ["prlimit", f"--nofile={descriptors}", *program("worker"), "serve", "--config", config],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr


async def test_start_that_cannot_keep_live_jobs_output_is_refused_and_harms_none(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    few: Settings = {
        "worker": {"max_concurrent_jobs": 2, "max_waiting_jobs": 1},
        "limits": {"max_connections": 20, "max_handshakes": 5},
    }
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            jobs = [await start(wire, f"echo {n}; sleep 600") for n in range(40)]
            for job in jobs:
                await until_bigger(wire, job, 0)
        enough_for_few = OWN + 5 * 2 + 3 * 1 + 25 + 16 * 3
        said = failed_start(directory, few, enough_for_few)
        assert "cannot serve by this configuration: 203 file descriptors" in said
        # What is wrong with one job's place must not cost it its life.
        state = directory / "state" / "service"
        (state / "set-aside").touch()
        index = state / "spool" / str(jobs[0]) / "index"
        index.rename(directory / "index")
        said = failed_start(directory, {}, 20_000)
        assert f"cannot go on with job {jobs[0]}: cannot set aside" in said
        (directory / "index").rename(index)
        (state / "set-aside").unlink()
        async with serving(directory) as service, open_wire(service) as wire:
            for number, job in enumerate(jobs):
                record = await wire.call("job.status", id=job)
                assert (record["state"], record["detail"]) == ("RUNNING", "")
                assert (await log_of_now(wire, job)) == f"{number}\n".encode()
                await wire.call("job.stop", id=job, signal="KILL")
        assert not (state / "set-aside").exists()


async def log_of_now(wire: Wire, job: int) -> bytes:
    result = await wire.call("job.log", id=job, follow=False)
    out, _, _ = await wire.output(result["subscription"])
    return out
