"""What a client's flood does to a quiet client of its own certificate: a table, a row each.

    python -m bench.fairness [NAME…] [--seconds 5] [--apart]

Each flood (`bench.floods`) comes from a process of its own and meets a service of its own, with the
default limits and 50,000 ended jobs in its history. Beside it a quiet client says `hello` ten
times, runs `true` to its end and connects once more, again and again; the same was measured before
on the idle service. Then come the service's memory (at the start, at its peak, and once the flood
has gone), how many descriptors are left over, and the longest turn of the event loop
(`bench.turns`). What misses its aim stands in bold:

    hello    p99 at most 25 ms
    true     p50 at most twice that of the idle service, p99 at most five times
    connect  p99 at most a second: the new connection's `hello` included
    memory   peak at most 256 MB, and afterwards at most a fifth above that at the start
    fds      none left

What a flood's own process takes of the machine is in these figures. `--apart` leaves it out, as
with clients on other machines: service, launcher, jobs and quiet client have the first processor,
on the idle service as well, and the flood has the others.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import apsw
import trio
from attrs import frozen
from bench.floods import FLOODS, PROCESSORS
from bench.turns import watched_turns

from jobworker.cli.worker.embedded_service import EmbeddedService, open_embedded
from jobworker.client.client import Client
from jobworker.client.opening import open_client
from jobworker.jobs.history.history import History
from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.model.lifecycle import State
from jobworker.pki.administration import init_authority
from jobworker.pki.authority import Authority
from jobworker.pki.files import write_new
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

MB = 1_000_000
RECORDS = 50_000
IDLE_SECONDS = 3.0
SETTLE_SECONDS, GOODBYE_SECONDS = 5.0, 20.0
TURN_SECONDS = 2.0
HELLOS = 10
"""For each run of `true`."""
PAUSE_SECONDS = 0.005

HELLO_P99_MS = 25.0
RUN_P50, RUN_P99 = 2.0, 5.0
CONNECT_P99_MS = 1000.0
PEAK_BYTES = 256 * MB
AFTERWARDS = 1.2

OpenClient = Callable[[], AbstractAsyncContextManager[Client]]


@frozen
class Times:
    """How long the quiet client waited, in milliseconds."""

    hello: list[float]
    run: list[float]
    connect: list[float]


@frozen
class Row:
    """What one flood did."""

    idle: Times
    flooded: Times
    start_bytes: int
    peak_bytes: int
    after_bytes: int
    descriptors_left: int
    asked: int


def percentile(times: list[float], percent: int) -> float:
    """Of the times, without interpolation: the worst of few is no better than it was."""
    return sorted(times)[min(len(times) - 1, math.ceil(len(times) * percent / 100))]


async def quiet(client: Client, another: OpenClient, seconds: float) -> Times:
    """Be the quiet client for so long."""
    times = Times([], [], [])
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        for _ in range(HELLOS):
            began = time.perf_counter()
            await client.hello()
            times.hello.append(1e3 * (time.perf_counter() - began))
            await trio.sleep(PAUSE_SECONDS)
        began = time.perf_counter()
        ended = await (await client.run(["true"])).wait()
        times.run.append(1e3 * (time.perf_counter() - began))
        assert ended.state is State.COMPLETED, ended
        began = time.perf_counter()
        async with another() as new:
            await new.hello()
            times.connect.append(1e3 * (time.perf_counter() - began))
    return times


def status_bytes(service: EmbeddedService, field: str) -> int:
    """A field of the service's /proc/PID/status: proc(5)."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def forget_peak(service: EmbeddedService) -> None:
    """Count the peak, VmHWM, from now on: proc(5), clear_refs."""
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")


def descriptors(service: EmbeddedService) -> int:
    """How many the service's process has open, those of its history apart.

    Readers of the history (`jobs.history.readers`) are opened at need and kept, three at the most.
    """
    count = 0
    for each in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += not each.readlink().name.startswith("history.db")
    return count


def make_history(path: Path, count: int = RECORDS) -> None:
    """A history of ended jobs, half of them with the label x=a, the others with y=b."""
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    record = JobRecord(
        id=JobId(1),
        state=State.COMPLETED,
        created_at=now,
        ended_at=now,
        output_removed_at=now,
        spec=JobSpec(command=("true",)),
        owner="admin-client",
        exit_code=0,
    )
    History.open(path).close()
    connection = apsw.Connection(str(path))
    with connection:
        connection.execute(
            """WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < ?1)
            INSERT INTO jobs SELECT id, 'COMPLETED', 'admin-client', '2026-01-31', json_set(
                ?2, '$.id', id, '$.spec.labels',
                json(iif(id % 2, '{"x":"a"}', '{"y":"b"}'))) FROM n""",
            (count, dumps(unstructure(record))),
        )
        connection.execute(
            """INSERT INTO labels SELECT label.key, label.value, jobs.id
            FROM jobs, json_each(jobs.record, '$.spec.labels') AS label ORDER BY 1, 2, 3"""
        )
    connection.close()


def prepare(directory: Path, history: Path) -> None:
    """Make what `open_service` starts a service with."""
    directory.mkdir()
    certs, now = directory / "certs", datetime.now(UTC)
    init_authority(certs, [], now=now)
    issued = Authority.load(certs).issue_client("quiet", "admin", now=now)
    write_new(certs, issued.files("quiet-client"))
    (directory / "state" / "service").mkdir(parents=True)
    shutil.copy(history, directory / "state" / "service" / "history.db")


@asynccontextmanager
async def open_service(directory: Path, history: Path) -> AsyncIterator[EmbeddedService]:
    """A service with a copy of that history, and a certificate for the quiet client."""
    prepare(directory, history)
    async with open_embedded(directory) as service:
        yield service


async def settle(
    service: EmbeddedService, client: Client, bound_bytes: float, descriptors_before: int
) -> None:
    """Wait until the service is as it was, but not for long; what the flood has started is ended.

    A last request of its may be served after it has gone, and each connection of its says goodbye.
    """
    began = trio.current_time()
    with trio.move_on_after(GOODBYE_SECONDS):
        while True:
            for job in await client.list(limit=1000):
                if not job.ended:
                    await client.job(job.id).stop(signal="KILL")
            small = status_bytes(service, "VmRSS") <= bound_bytes
            all_gone = descriptors(service) <= descriptors_before
            if all_gone and (small or trio.current_time() > began + SETTLE_SECONDS):
                break
            await trio.sleep(0.2)


@asynccontextmanager
async def flooding(
    service: EmbeddedService, name: str, seconds: float
) -> AsyncIterator[list[bytes]]:
    """Have a service flooded from the block's begin on; then how much was asked of it."""
    certs, said = service.directory / "certs", list[bytes]()
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "bench.floods", name, service.address, certs, str(seconds)],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    begun = b""
    while b"\n" not in begun:
        piece = await process.stdout.receive_some()
        assert piece, f"the flood {name} does not begin"
        begun += piece
    yield said
    said.append(b"".join([piece async for piece in process.stdout]))
    assert await process.wait() == 0, f"the flood {name} broke off"


async def longest_turn(directory: Path, name: str, seconds: float) -> str:
    """Of the event loop of a service that is flooded, in milliseconds, and whose it was.

    The instrument takes a sixth of the loop's time, so it has a service of its own.
    """
    with watched_turns() as turns:
        async with open_service(directory / f"{name}-turns", directory / "history.db") as service:
            async with flooding(service, name, seconds):
                turns.reset()
            return f"{turns.longest_ms():.0f} ({turns.task().rpartition('.')[2]})"


async def measure(service: EmbeddedService, name: str, seconds: float, idle_seconds: float) -> Row:
    """Flood a service, with a quiet client beside."""
    names = service.environment("quiet")
    ca, certificate, key = (Path(names[f"WORKER_{each}_PATH"]) for each in ("CA", "CERT", "KEY"))
    open_one = partial(open_client, service.address, ca=ca, certificate=certificate, key=key)
    async with open_one() as client:
        idle = await quiet(client, open_one, idle_seconds)
        before, start = descriptors(service), status_bytes(service, "VmRSS")
        forget_peak(service)
        async with flooding(service, name, seconds) as said:
            flooded = await quiet(client, open_one, seconds)
        await settle(service, client, AFTERWARDS * start, before)
        return Row(
            idle=idle,
            flooded=flooded,
            start_bytes=start,
            peak_bytes=status_bytes(service, "VmHWM"),
            after_bytes=status_bytes(service, "VmRSS"),
            descriptors_left=descriptors(service) - before,
            asked=int(said[0]),
        )


def _marked(value: float, aim: float, form: str = ".1f") -> str:
    text = format(value, form)
    return text if value <= aim else f"**{text}**"


def line(what: str, row: Row, turn: str) -> str:
    """A row of the table."""
    hello, run, idle = row.flooded.hello, row.flooded.run, row.idle.run
    idle_p50, idle_p99 = statistics.median(idle), percentile(idle, 99)
    cells = [
        what,
        str(row.asked),
        f"{statistics.median(hello):.1f}",
        _marked(percentile(hello, 99), HELLO_P99_MS),
        f"{idle_p50:.0f} / {idle_p99:.0f}",
        _marked(statistics.median(run) / idle_p50, RUN_P50),
        _marked(percentile(run, 99) / idle_p99, RUN_P99),
        _marked(percentile(row.flooded.connect, 99), CONNECT_P99_MS, ".0f"),
        f"{row.start_bytes / MB:.0f}",
        _marked(row.peak_bytes / MB, PEAK_BYTES / MB, ".0f"),
        _marked(row.after_bytes / MB, AFTERWARDS * row.start_bytes / MB, ".0f"),
        _marked(row.descriptors_left, 0, "d"),
        turn,
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = """\
| flood | asked | hello p50, ms | p99, ms | idle true p50 / p99, ms | true p50, times idle | \
p99, times idle | connect p99, ms | memory, MB | peak, MB | afterwards, MB | fds left | \
longest turn, ms |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


@contextmanager
def place() -> Iterator[Path]:
    """A directory for services, with a history to begin with."""
    with tempfile.TemporaryDirectory(prefix="jobworker-fairness-", dir="/var/tmp") as made:
        directory = Path(made)
        directory.chmod(0o755)
        make_history(directory / "history.db")
        yield directory


async def flood(
    directory: Path, name: str, seconds: float, idle_seconds: float = IDLE_SECONDS
) -> Row:
    """Flood a service of its own in `directory`, that of `place`."""
    async with open_service(directory / name, directory / "history.db") as service:
        return await measure(service, name, seconds, idle_seconds)


def keep_apart() -> None:
    """Keep to one processor from now on, and have the floods keep to the others."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise SystemExit("--apart needs a machine with two processors at least")
    os.sched_setaffinity(0, [first])
    os.environ[PROCESSORS] = " ".join(map(str, others))


def main(names: list[str], seconds: float, *, apart: bool) -> None:
    """Run the floods and print the table."""
    if apart:
        keep_apart()
    print(HEAD)
    with place() as directory:
        for name in names:
            row = trio.run(flood, directory, name, seconds)
            turn = trio.run(longest_turn, directory, name, TURN_SECONDS)
            print(line(FLOODS[name].what, row, turn), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*FLOODS, []])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--apart", action="store_true")
    arguments = parser.parse_args()
    main(arguments.names or list(FLOODS), arguments.seconds, apart=arguments.apart)
