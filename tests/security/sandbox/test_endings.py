"""Jobs that will not end, ends that race, and a service that is killed meanwhile: nothing is left.

JOBWORKER_SOAK=1 (`make soak`) makes the numbers large.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio_websocket

from jobworker.cli.worker.embedded_service import EmbeddedService

from ...integration.conftest import left_behind, until
from ...integration.wire import Json, Wire, open_wire
from ...services import open_embedded

SOAK = bool(os.environ.get("JOBWORKER_SOAK"))

STUBBORN = {
    "ignores_every_signal": (
        "import signal\nfor n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    ),
    "stops_itself": "import os, signal\nif os.fork(): os.kill(os.getpid(), signal.SIGSTOP)\n",
    "forks_while_it_is_killed": (
        "import os\nfor _ in range(3): os.fork()\n"
        "def go():\n    while True:\n"
        "        try:\n            if os.fork(): os._exit(0)\n"
        "        except OSError: pass\n"
        "if os.getpid() != 1:\n    print('ready', flush=True); go()\n"
    ),
    "daemonises": (
        "import os\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork(): os._exit(0)\n"
        "        import time; time.sleep(1000)\n"
    ),
    "resets_its_parent_death_signal": "import ctypes; ctypes.CDLL(None).prctl(1, 0)\n",
}


@pytest.mark.parametrize("kind", STUBBORN)
async def test_stop_ends_everything(admin: Wire, kind: str) -> None:
    word = f"stubborn-{kind}-{os.getpid()}"
    program = f"{STUBBORN[kind]}\nprint('ready', flush=True)\nimport time\ntime.sleep(1000)"
    spec = {"command": ["python3", "-c", program, word], "limits": {"processes": 100}}
    result = await admin.call("job.run", job=spec, follow={})
    job = result["job"]
    assert isinstance(job, dict)
    await admin.notes(result["subscription"]).receive()
    assert processes(word), "the control: it runs"
    await admin.call("job.stop", id=job["id"], grace_seconds=0.2)
    assert processes(word) == []
    assert (await admin.call("job.status", id=job["id"]))["state"] == "STOPPED"


def processes(word: str) -> list[str]:
    """Live processes of the host with `word` among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in arguments:
            found.append(path.name)
    return found


async def test_start_stop_and_exit_race(admin: Wire, service: EmbeddedService) -> None:
    """Jobs that end by themselves just when they are stopped: each has one end, none is left."""
    count = 5000 if SOAK else 60
    ended: list[Json] = []

    async def one(number: int) -> None:
        job = await admin.start("sh", "-c", f"sleep 0.00{number % 10}; exit 3")
        if number % 3:
            await trio.sleep(0.001 * (number % 7))
            await admin.call("job.stop", id=job, grace_seconds=0)
        ended.append(await admin.call("job.wait", id=job))

    for first in range(0, count, 20):
        async with trio.open_nursery() as nursery:
            for number in range(first, first + 20):
                nursery.start_soon(one, number)
    assert len(ended) == count
    for job in ended:
        assert job["state"] == "STOPPED" or (job["state"], job["exit_code"]) == ("FAILED", 3), job
    scratch = service.directory / "state" / "scratch"
    await until(lambda: len(list(scratch.iterdir())) <= 8)


@pytest.mark.skipif(not SOAK, reason="ten thousand jobs take minutes: JOBWORKER_SOAK=1")
@pytest.mark.timeout(3600)
async def test_ten_thousand_jobs_leave_nothing(admin: Wire, service: EmbeddedService) -> None:
    pid = service.process.pid
    before = len(os.listdir(f"/proc/{pid}/fd"))
    for _ in range(500):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(admin.run, "true")
    await until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before + 4)


# --- the service is killed ----------------------------------------------------------------------

MOMENTS = ("while_a_job_is_asked_for", "while_it_runs", "while_it_is_stopped", "as_it_ends")


@pytest.mark.parametrize("moment", MOMENTS)
async def test_service_killed_at_any_moment_leaves_nothing(
    open_directory: Callable[[], Path], moment: str
) -> None:
    directory = open_directory()
    for number in range(40 if SOAK else 1):
        word = f"killed-{moment}-{number}-{os.getpid()}"
        script = f"exec -a {word} sleep {0.02 if moment == 'as_it_ends' else 1000}"
        async with open_embedded(directory) as service:
            async with open_wire(service) as wire, trio.open_nursery() as nursery:
                if moment == "while_a_job_is_asked_for":
                    for _ in range(8):
                        nursery.start_soon(_ask, wire, script)
                    await trio.sleep(0.002 * number)
                else:
                    job = await wire.start("bash", "-c", script)
                    if moment == "while_it_is_stopped":
                        nursery.start_soon(_stop, wire, job)
                    await trio.sleep(0.02 + 0.001 * number)
                service.process.kill()
                await service.process.wait()
                nursery.cancel_scope.cancel()
            await until(lambda word=word: processes(word) == [])  # type: ignore[misc]
            await until(lambda: left_behind(directory) == [])
    async with open_embedded(directory) as service, open_wire(service) as wire:
        jobs = (await wire.call("job.list"))["jobs"]
        assert isinstance(jobs, list)
        assert all(job["state"] in ("FAILED", "STOPPED", "COMPLETED") for job in jobs), jobs
        out, _, _ = await wire.run("echo", "again")
        assert out == "again\n"


async def _ask(wire: Wire, script: str) -> None:
    with contextlib.suppress(trio.EndOfChannel, trio_websocket.ConnectionClosed):
        await wire.start("bash", "-c", script)


async def _stop(wire: Wire, job: int) -> None:
    with contextlib.suppress(trio.EndOfChannel, trio_websocket.ConnectionClosed):
        await wire.call("job.stop", id=job, grace_seconds=5)
