"""Why a job was to end, by what signal and until when: the same for the next service."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from .conftest import left_behind, locked_history, until
from .outside import open_launcher
from .test_takeover import Settings, log_of, processes, serving, start
from .wire import Refused, Wire, open_wire

MARK = f"mark-{os.getpid()}"
SLOW_END = (
    f"m=mark; trap 'exec sh -c \"sleep 1.5\" $m-{os.getpid()}' TERM; echo up; "
    "head -c 8192 /dev/zero; while :; do sleep 0.02; done"
)
"""Needs a while after the signal, as a process with `MARK`, and ends as if nobody had asked."""
HEEDS_NONE = (
    "trap 'echo INT' INT; trap 'echo TERM' TERM; echo up; i=0; "
    "while [ $i -lt 60 ]; do i=$((i+1)); sleep 0.05; done; echo whole; exit 6"
)
LIMITED: dict[str, object] = {"limits": {"output_bytes": 4096}, "at_max_output": "stop"}


def has_written(directory: Path, job: int, words: str) -> bool:
    """Whether a job's output has `words`, though no service may be there to be asked."""
    spool = directory / "state" / "service" / "spool"
    try:
        return words in (spool / str(job) / "stdout").read_text()
    except FileNotFoundError:
        return False


async def stop_in_vain(
    wire: Wire, job: int, *, task_status: trio.TaskStatus[None], **how: object
) -> None:
    """Ask a service for a stop that it does not see to the end."""
    task_status.started()
    with pytest.raises((trio.EndOfChannel, Refused)):
        await wire.call("job.stop", id=job, **how)


async def end(service: EmbeddedService, number: signal.Signals) -> None:
    service.process.send_signal(number)
    with trio.fail_after(40):
        await service.process.wait()


@pytest.mark.parametrize(
    ("cause", "spec", "verdict"),
    [
        ("stop", {}, ("STOPPED", None)),
        ("timeout", {"timeout_seconds": 1}, ("FAILED", "timeout")),
        ("output", LIMITED, ("FAILED", "output")),
    ],
)
async def test_cause_of_an_end_outlives_a_kill_of_the_service(
    open_directory: Callable[[], Path],
    cause: str,
    spec: dict[str, object],
    verdict: tuple[str, str | None],
) -> None:
    """Also where the history takes no record of it: another program has locked that."""
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, SLOW_END, **spec)
            with locked_history(directory):
                await until(lambda: has_written(directory, job, "up"))
                async with trio.open_nursery() as nursery:
                    if cause == "stop":
                        await nursery.start(stop_in_vain, wire, job)
                    await until(lambda: processes(MARK))
                    await end(service, signal.SIGKILL)
        await until(lambda: not processes(MARK))
        async with serving(directory) as service, open_wire(service) as wire:
            ended = await wire.call("job.wait", id=job)
            assert (ended["state"], ended["reason"]) == verdict
            assert (ended["exit_code"], ended["signal"]) == (0, None)
            assert bool(ended["stop_requested_at"]) == (cause == "stop")
    assert left_behind(directory) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_signal_and_grace_of_a_stop_outlive_the_service(
    open_directory: Callable[[], Path], number: signal.Signals
) -> None:
    """The client asks the next service for the same again, as the public one does."""
    directory = open_directory()
    short: Settings = {"worker": {"stop_grace": "300ms"}}
    how = {"signal": "INT", "grace_seconds": 60}
    with open_launcher(directory):
        async with serving(directory, short) as service, open_wire(service) as wire:
            job = await start(wire, HEEDS_NONE)
            await until(lambda: has_written(directory, job, "up"))
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    lambda task_status: stop_in_vain(wire, job, task_status=task_status, **how)
                )
                await until(lambda: has_written(directory, job, "INT"))
                await end(service, number)
        async with serving(directory, short) as service, open_wire(service) as wire:
            ended = await wire.call("job.stop", id=job, **how)
            assert (ended["state"], ended["exit_code"]) == ("STOPPED", 6)
            assert (await log_of(wire, job))[0].split() == [b"up", b"INT", b"whole"]
    assert left_behind(directory) == []


async def test_short_grace_stays_short(open_directory: Callable[[], Path]) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, HEEDS_NONE.replace("-lt 60", "-lt 6000"))
            await until(lambda: has_written(directory, job, "up"))
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    lambda task_status: stop_in_vain(
                        wire, job, task_status=task_status, grace_seconds=0.5
                    )
                )
                await until(lambda: has_written(directory, job, "TERM"))
                await end(service, signal.SIGKILL)
        long: Settings = {"worker": {"stop_grace": "600s"}}
        async with serving(directory, long) as service, open_wire(service) as wire:
            with trio.fail_after(20):
                ended = await wire.call("job.wait", id=job)
            assert (ended["state"], ended["signal"]) == ("STOPPED", signal.SIGKILL)
            assert (await log_of(wire, job))[0].split() == [b"up", b"TERM"]
    assert left_behind(directory) == []
