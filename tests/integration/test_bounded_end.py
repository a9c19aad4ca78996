"""One request that the launcher cannot answer holds up neither a stop nor the service's end."""

import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import apsw
import pytest
import trio

from ..services import open_embedded
from .conftest import child_of, children_of, left_behind, spares_of, until
from .outside import open_launcher
from .test_ends_over_restarts import end, has_written
from .test_takeover import first_of, serving, start
from .wire import Json, Refused, Wire, open_wire

END_SECONDS = 20
"""Well below the 60 s that systemd gives the service."""


async def stop_spares(launcher: int) -> list[int]:
    """Stop the processes that wait for a job, once there are two of them."""
    await until(lambda: len(spares_of(launcher)) == 2)
    spares = spares_of(launcher)
    for pid in spares:
        os.kill(pid, signal.SIGSTOP)
    return spares


def go_on(processes: list[int]) -> None:
    """Let go of what was stopped, as far as it is there still."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def state_of(wire: Wire, job: int) -> object:
    return (await wire.call("job.status", id=job))["state"]


async def until_starting(wire: Wire, count: int) -> None:
    with trio.fail_after(20):
        while True:
            jobs = (await wire.call("job.list"))["jobs"]
            assert isinstance(jobs, list)
            if [job["state"] for job in jobs].count("INITIALIZING") == count:
                return
            await trio.sleep(0.02)


async def test_start_that_is_held_can_be_stopped_and_waits_for_the_next_service(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    told: list[Json] = []
    with open_launcher(directory) as launcher:
        async with serving(directory) as service, open_wire(service) as wire:
            await stop_spares(child_of(launcher.pid))

            async def run() -> None:
                with suppress(trio.EndOfChannel, Refused):
                    told.append(await wire.call("job.run", job={"command": ["echo", "x"]}))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await until_starting(wire, 1)
                nursery.start_soon(run)
                await until_starting(wire, 2)
                with trio.fail_after(25):  # the launcher itself would give it up after 30 s
                    stopped = await wire.call("job.stop", id=1)
                assert (stopped["state"], stopped["started_at"]) == ("STOPPED", None)
                assert await state_of(wire, 2) == "INITIALIZING"
                with trio.fail_after(END_SECONDS):
                    await end(service, signal.SIGTERM)
            assert service.process.returncode == 0
            assert "job 2: left to the next service" in service.log_text()
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=2)
            assert (ended["state"], ended["stdout_bytes"]) == ("COMPLETED", 2)
    assert left_behind(directory) == []


@pytest.mark.timeout(120)
async def test_start_that_is_held_fails_by_name(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    with open_launcher(directory) as launcher:
        async with serving(directory) as service, open_wire(service) as wire:
            await stop_spares(child_of(launcher.pid))
            with (
                trio.fail_after(60),
                pytest.raises(Refused, match="its program was not executed within 30 s"),
            ):
                await start(wire, "echo x")
            failed = await wire.call("job.status", id=1)
            assert (failed["state"], failed["reason"]) == ("FAILED", "start")
    assert left_behind(directory) == []


async def test_remains_that_cannot_be_cleared_away_do_not_hold_the_end(
    open_directory: Callable[[], Path],
) -> None:
    """A process that goes on stands in the group of a job that ended: here one of the host's."""
    directory = open_directory()
    mark = f"remains-{os.getpid()}-"
    with open_launcher(directory), a_process() as stranger:
        async with serving(directory) as service, open_wire(service) as wire:
            script = "trap 'exit 3' USR1; echo; while :; do sleep 0.05; done"
            job = await start(wire, f"{script}; : {mark}")
            await until(lambda: has_written(directory, job, "\n"))
            pid = first_of(mark)
            move_beside(pid, stranger)
            os.kill(pid, signal.SIGUSR1)
            assert (await wire.call("job.wait", id=job))["exit_code"] == 3
            with trio.fail_after(END_SECONDS):
                await end(service, signal.SIGTERM)
            assert service.process.returncode == 0
            assert f"the launcher has not forgotten these jobs yet: {job}" in service.log_text()
        async with serving(directory) as service, open_wire(service) as wire:
            assert (await wire.call("job.status", id=job))["exit_code"] == 3
            after = await wire.call("job.wait", id=await start(wire, "exit 4"))
            assert after["exit_code"] == 4
    assert left_behind(directory) == []


@contextmanager
def a_process() -> Iterator[int]:
    """A process of this host, until the block ends."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def move_beside(job: int, stranger: int) -> None:
    """Move a process into a control group of a job."""
    for line in Path(f"/proc/{job}/cgroup").read_text().splitlines():
        name = Path(line.split(":", 2)[2]).name
        if name.startswith("job-"):
            for group in Path("/sys/fs/cgroup").glob(f"**/{name}/cgroup.procs"):
                group.write_text(str(stranger))
                return
    raise AssertionError("no control group of the job's own")


async def test_launcher_that_reads_nothing_does_not_hold_the_end(
    open_directory: Callable[[], Path],
) -> None:
    """Its socket is full. What was never sent waits for the next service; the rest may have run."""
    directory, count = open_directory(), 20
    with open_launcher(directory) as guard:
        launcher = child_of(guard.pid)
        async with serving(directory) as service, open_wire(service) as wire:

            async def run() -> None:
                with suppress(trio.EndOfChannel, Refused):
                    await wire.call("job.run", job={"command": ["true", "x" * 30_000]})

            os.kill(launcher, signal.SIGSTOP)
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(count):
                        nursery.start_soon(run)
                    await until_starting(wire, count)
                    with trio.fail_after(END_SECONDS):
                        await end(service, signal.SIGTERM)
            finally:
                os.kill(launcher, signal.SIGCONT)
            assert service.process.returncode == 0
        async with serving(directory) as service, open_wire(service) as wire:
            ends = [await wire.call("job.wait", id=job) for job in range(1, count + 1)]
            states = [(ended["state"], ended["reason"]) for ended in ends]
            assert set(states) <= {("COMPLETED", None), ("FAILED", "lost")}
            assert ("COMPLETED", None) in states
    assert left_behind(directory) == []


async def test_volume_that_is_never_made_does_not_hold_the_end(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    refusals: list[str] = []
    with open_launcher(directory) as guard:
        launcher = child_of(guard.pid)
        async with serving(directory) as service, open_wire(service) as wire:
            await until(lambda: len(children_of(launcher)) == 4)  # two of them spares

            async def make(name: str, done: trio.Event) -> None:
                with suppress(trio.EndOfChannel):
                    try:
                        await wire.call("volume.create", name=name, size_bytes=1 << 30)
                    except Refused as refusal:
                        refusals.append(str(refusal))
                done.set()

            async with trio.open_nursery() as nursery:
                spares, maker = set(children_of(launcher)), 0
                with trio.fail_after(60):
                    for number in itertools.count():  # until one is caught before it is through
                        done = trio.Event()
                        nursery.start_soon(make, f"v{number}", done)
                        while not (maker or done.is_set()):
                            maker = stopped(children_of(launcher).keys() - spares)
                            await trio.lowlevel.checkpoint()
                        if maker:
                            break
                try:
                    with trio.fail_after(END_SECONDS):
                        await end(service, signal.SIGTERM)
                finally:
                    os.kill(maker, signal.SIGCONT)
            assert service.process.returncode == 0
            assert len(refusals) == 1
            assert "the service is shutting down" in refusals[0]
        await until(lambda: maker not in children_of(launcher))
    assert left_behind(directory) == []


def stopped(processes: set[int]) -> int:
    """The one of these processes, if there is one, that could be stopped before its end."""
    for pid in processes:
        with suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
            while (state := Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][1]) != "T":
                if state == "Z":
                    break
            else:
                return pid
    return 0


async def run_in_vain(wire: Wire, *command: str) -> None:
    """Ask for a job whose start this service does not see."""
    with suppress(trio.EndOfChannel, Refused):
        await wire.call("job.run", job={"command": command})


async def test_start_under_way_at_a_kill_of_the_service_waits_for_the_next_one(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory) as guard:
        launcher = child_of(guard.pid)
        async with serving(directory) as service, open_wire(service) as wire:
            stopped = await stop_spares(launcher)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_in_vain, wire, "echo", "x")
                await until(lambda: len(spares_of(launcher)) == 3)  # instead of one it took
                await end(service, signal.SIGKILL)
        go_on(stopped)
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=1)
            assert (ended["state"], ended["stdout_bytes"]) == ("COMPLETED", 2)
    assert left_behind(directory) == []


async def test_start_that_a_stopped_launcher_has_not_seen_waits_for_the_next_service(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory) as guard:
        launcher = child_of(guard.pid)
        async with serving(directory) as service, open_wire(service) as wire:
            spares = await stop_spares(launcher)
            os.kill(launcher, signal.SIGSTOP)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run_in_vain, wire, "echo", "x")
                    await until_starting(wire, 1)
                    with trio.fail_after(2 * END_SECONDS):
                        await end(service, signal.SIGTERM)
            finally:
                os.kill(launcher, signal.SIGCONT)
            assert "job 1: left to the next service" in service.log_text()
        await until(lambda: spares[0] not in children_of(launcher))
        go_on(spares)
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=1)
            assert (ended["state"], ended["stdout_bytes"]) == ("COMPLETED", 2)
    assert left_behind(directory) == []


async def stop_in_vain(wire: Wire, job: int) -> None:
    """Ask for a job's stop where this service does not see its end."""
    with suppress(trio.EndOfChannel, Refused):
        await wire.call("job.stop", id=job)


async def until_stop_is_asked(wire: Wire, job: int) -> None:
    with trio.fail_after(20):
        while True:
            if (await wire.call("job.status", id=job))["stop_requested_at"] is not None:
                return
            await trio.sleep(0.01)


async def test_stop_of_a_start_that_a_stopped_launcher_has_not_seen_is_kept(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    with open_launcher(directory) as guard:
        launcher = child_of(guard.pid)
        async with serving(directory) as service, open_wire(service) as wire:
            os.kill(launcher, signal.SIGSTOP)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run_in_vain, wire, "sleep", "600")
                    await until_starting(wire, 1)
                    nursery.start_soon(stop_in_vain, wire, 1)
                    await until_stop_is_asked(wire, 1)
                    with trio.fail_after(2 * END_SECONDS):
                        await end(service, signal.SIGTERM)
            finally:
                os.kill(launcher, signal.SIGCONT)
            assert "job 1: left to the next service" in service.log_text()
        async with serving(directory) as service, open_wire(service) as wire:
            assert (await wire.call("job.wait", id=1))["state"] == "STOPPED"
    assert left_behind(directory) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_second_signal_does_not_cut_the_end_short(
    open_directory: Callable[[], Path], number: signal.Signals
) -> None:
    """A second Ctrl-C, for example: what the service still has to record is recorded."""
    directory = open_directory()
    settings = {"worker": {"stop_grace": "2s"}}
    async with open_embedded(directory, settings) as service:
        async with open_wire(service) as wire:
            script = "trap '' TERM; echo ready; while :; do sleep 1; done"
            result = await wire.call("job.run", job={"command": ["sh", "-c", script]}, follow={})
            await wire.notes(result["subscription"]).receive()
            service.process.send_signal(number)
            await until(lambda: f"ending: {number.name}" in service.log_text())
            service.process.send_signal(number)
            with trio.fail_after(END_SECONDS):
                await service.process.wait()
        assert service.process.returncode == 0
        assert " INFO ended\n" in service.log_text()
    with closing(apsw.Connection(str(directory / "state" / "service" / "history.db"))) as history:
        (last,) = history.execute("SELECT action FROM audit ORDER BY id DESC LIMIT 1")
    assert last == ("service.end",)
