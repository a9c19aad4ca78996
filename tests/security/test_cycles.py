"""What a connection or a job held is free once it has ended, however that was: no search for cycles
is due.

Python's search for objects that refer to each other comes seldom, for it stops the loop; until then
a connection would keep what it had, up to a megabyte, and so would a job.
"""

import json
import os
import re
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from ..integration.conftest import running, until
from ..integration.wire import Refused, Wire, open_socket, open_wire
from .raw_socket import TEXT, dial, frame, open_raw

OF_A_JOB = {
    *("BatchedEvent", "Ending", "Execution", "JobRecord", "LiveRecord", "OutputMover"),
    *("Settlement", "Spool", "Starting", "frame"),
}
OURS = {"Conversation", "FramedSocket", "Nursery", "SocketStream", "TLSStream", "frame"}
INSIDE = """
import os, sys
path = os.environ.get("JOBWORKER_TEST_CYCLES")
if path and "serve" in sys.argv:
    import gc, json, signal
    name_of = lambda each: type(each).__qualname__
    def tell(*_):
        gc.collect()
        with open(f"{path}/new", "w") as file:
            found = [name_of(each) for each in gc.garbage]
            found += [f"{name} alive" for name in set(map(name_of, gc.get_objects()))]
            json.dump(found, file)
        os.rename(f"{path}/new", f"{path}/found")
        gc.garbage.clear()
        gc.set_debug(0)
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
    gc.set_debug(gc.DEBUG_SAVEALL)
    signal.signal(signal.SIGUSR2, tell)
"""


@pytest.fixture(scope="module")
def found(open_directory: Callable[[], Path]) -> Iterator[Path]:
    """Where a service that is started meanwhile tells, on SIGUSR2, what was in cycles."""
    directory = open_directory()
    directory.chmod(0o777)
    (directory / "sitecustomize.py").write_text(INSIDE)
    python_path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOBWORKER_TEST_CYCLES", str(directory))
        patch.setenv("PYTHONPATH", os.pathsep.join(python_path))
        yield directory / "found"


@pytest.fixture(scope="module")
def watched(found: Path, open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A service that tells."""
    with running(open_directory(), {}) as made:
        yield made


async def close_politely(service: EmbeddedService) -> None:
    async with open_wire(service) as wire:
        await wire.call("service.hello")


async def leave_replies_half_read(service: EmbeddedService) -> None:
    async with open_wire(service) as wire:
        large = {"command": ["true"], "environment": {f"V{n}": "x" * 30 for n in range(15_000)}}
        job = (await wire.call("job.run", job=large))["job"]
        assert isinstance(job, dict)
        await wire.call("job.wait", id=job["id"])
        output = await wire.start("head", "-c", "8000000", "/dev/zero")
    async with open_raw(service, buffer=4096) as raw:
        for number in range(20):
            for method, id_ in ("job.status", job["id"]), ("job.log", output):
                ask = {"jsonrpc": "2.0", "id": number, "method": method, "params": {"id": id_}}
                await raw.send(frame(TEXT, json.dumps(ask).encode()))
        await trio.sleep(0.3)


async def break_off_in_a_request(service: EmbeddedService) -> None:
    async with open_raw(service) as raw:
        await raw.send(frame(TEXT, b"[" * 500_000)[:-1])


async def send_what_is_no_frame(service: EmbeddedService) -> None:
    async with open_raw(service) as raw:
        await raw.send(frame(3, b"x"))
        with suppress(trio.BrokenResourceError):
            while await raw.stream.receive_some():
                pass


async def ask_for_what_the_role_denies(service: EmbeddedService) -> None:
    async with open_socket(service, "viewer") as socket:
        job = {"command": ["true", "x" * 20_000]}
        ask = {"jsonrpc": "2.0", "id": 1, "method": "job.run", "params": {"job": job}}
        await socket.send_message(json.dumps(ask))
        assert "permission_denied" in await socket.get_message()


async def speak_no_tls(service: EmbeddedService) -> None:
    async with await dial(service) as tcp:
        await tcp.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            await tcp.receive_some()


async def search(service: EmbeddedService, found: Path) -> set[str]:
    """The types of what was in cycles since the last search, and of what is alive."""
    found.unlink(missing_ok=True)
    service.process.send_signal(signal.SIGUSR2)
    await until(found.exists)
    return set(json.loads(found.read_text()))


def sockets(service: EmbeddedService) -> int:
    """How many the service has open."""
    count = 0
    for each in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += each.readlink().name.startswith("socket:")
    return count


ENDS = [
    *(close_politely, leave_replies_half_read, break_off_in_a_request),
    *(send_what_is_no_frame, ask_for_what_the_role_denies, speak_no_tls),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_connection_leaves_no_cycle(
    watched: EmbeddedService, found: Path, end: Callable[[EmbeddedService], Awaitable[None]]
) -> None:
    async with open_wire(watched, "viewer") as bystander:
        await search(watched, found)  # what the start has left, and the test before
        before = sockets(watched)
        await end(watched)
        await until(lambda: sockets(watched) <= before)
        for _ in range(3):  # and the tasks that closed them are over
            await bystander.call("service.hello")
        left = await search(watched, found)
    assert OURS.isdisjoint(left), sorted(left)


def jobs_forgotten(service: EmbeddedService) -> int:
    """How many ended jobs the service has let go of: it logs the last state of each then."""
    return len(re.findall(r"\bjob \d+: [A-Z]+\b", service.log_text()))


async def end_by_itself(wire: Wire) -> None:
    await wire.run("echo", "said")


async def be_stopped(wire: Wire) -> None:
    await wire.call("job.stop", id=await wire.start("sleep", "600"))


async def reach_its_time_limit(wire: Wire) -> None:
    await wire.run("sleep", "600", timeout_seconds=0.1)


async def reach_its_output_limit(wire: Wire) -> None:
    await wire.run("yes", limits={"output_bytes": 1 << 20}, at_max_output="stop")


async def not_start(wire: Wire) -> None:
    with suppress(Refused):
        await wire.start("there-is-no-such-program")


async def be_removed(wire: Wire) -> None:
    await wire.call("job.remove", id=await wire.start("sleep", "600"), force=True)


async def be_read_after_its_end(wire: Wire) -> None:
    job = await wire.start("echo", "said")
    await wire.call("job.wait", id=job)
    await wire.call("job.prune", keep_jobs=1000)  # returns once the archive has the job
    opened = await wire.call("job.log", id=job)
    assert (await wire.output(opened["subscription"]))[0] == b"said\n"


async def be_followed_beyond_its_end(wire: Wire) -> None:
    job = {"command": ["echo", "said"]}
    result = await wire.call("job.run", job=job, follow={"credit_bytes": 1})
    made, number = result["job"], result["subscription"]
    assert isinstance(made, dict)
    await wire.call("job.wait", id=made["id"])
    await wire.call("job.prune", keep_jobs=1000)
    await wire.notify("job.credit", subscription=number, bytes=10)
    assert (await wire.output(number))[0] == b"said\n"


@pytest.mark.parametrize(
    "end",
    [
        *(end_by_itself, be_stopped, reach_its_time_limit, reach_its_output_limit),
        *(not_start, be_removed, be_read_after_its_end, be_followed_beyond_its_end),
    ],
    ids=lambda end: end.__name__,
)
async def test_job_leaves_no_cycle(
    watched: EmbeddedService, found: Path, end: Callable[[Wire], Awaitable[None]]
) -> None:
    async with open_wire(watched) as wire:
        await wire.call("service.hello")
        assert "Conversation alive" in await search(watched, found), "the control"
        before = jobs_forgotten(watched)
        await end(wire)
        await until(lambda: jobs_forgotten(watched) > before)
        for _ in range(3):  # and the task that logged it is over
            await wire.call("service.hello")
        left = await search(watched, found)
    assert OF_A_JOB.isdisjoint(left), sorted(left)
    assert "Execution alive" not in left
