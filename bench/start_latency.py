"""How long a job takes to start, beside other sandboxes in the same run.

    python -m bench.start_latency [--runs 200]

Each round starts one of each in turn, so that a drifting machine drifts for all alike; quote
the ratios. `bench/peers.py` tells what the others do. jobworker has everything on, and is timed
twice: as the launcher's client sees it, from its request to the first byte on the pipe
("launcher"), and as a client sees it, from `job.run` with follow on an open connection (mutual
TLS, WebSocket, JSON) to the first output byte ("over the wire").

Then: jobs per second, memory that a running job costs beyond its own, and how soon a job with
200 daemonised descendants is gone. Needs root, and what `make bench` installs.
"""

import argparse
import json
import shutil
import ssl
import statistics
import tempfile
import time
from pathlib import Path

import trio
import trio_websocket
from bench.launcher_side import LauncherSide
from bench.peers import BWRAP, ECHO, FIREJAIL, Bundle, Timer, time_process

from jobworker.cli.worker.embedded_service import EmbeddedService, open_embedded
from jobworker.pki.tls import client_context

PAUSE_SECONDS = 0.06
"""Between rounds: a server that starts a job now and then, not a busy one."""
DESCENDANTS = 200
SLEEPERS = 40
_DAEMONS = (
    f"trap '' TERM; for i in $(seq {DESCENDANTS}); do (setsid sleep 999 &); done; "
    "echo up; while :; do sleep 99; done"
)


class Connection:
    """A bare client: what any WebSocket library could do."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self._socket, self._calls = socket, 0

    async def call(self, method: str, **params: object) -> dict[str, object]:
        """Send a request and take its result; other messages are passed over."""
        await self._send(method, params)
        while True:
            message = json.loads(await self._socket.get_message())
            assert "error" not in message, message
            if message.get("id") == self._calls:
                result: dict[str, object] = message["result"]
                return result

    async def _send(self, method: str, params: object) -> None:
        self._calls += 1
        request = {"jsonrpc": "2.0", "id": self._calls, "method": method, "params": params}
        await self._socket.send_message(json.dumps(request))

    async def start_job(self, *command: str) -> int:
        """Start a job and wait for its first output: its number."""
        await self._send("job.run", {"job": {"command": command}, "follow": {}})
        job = 0
        while True:
            message = json.loads(await self._socket.get_message())
            assert "error" not in message, message
            if message.get("id") == self._calls:
                job = message["result"]["job"]["id"]
            elif message.get("method") == "job.output":
                return job

    async def run_job(self) -> tuple[float, float]:
        """Seconds to the first output byte, and to the notice of the job's end."""
        first = 0.0
        began = time.perf_counter()
        await self._send("job.run", {"job": {"command": ECHO}, "follow": {}})
        while True:
            message = json.loads(await self._socket.get_message())
            assert "error" not in message, message
            if message.get("method") == "job.output":
                first = time.perf_counter() - began
            elif message.get("method") == "job.output_end":
                return first, time.perf_counter() - began


def tls_for(service: EmbeddedService) -> ssl.SSLContext:
    """The admin's certificate."""
    names = service.environment()
    return client_context(
        ca=Path(names["WORKER_CA_PATH"]),
        certificate=Path(names["WORKER_CERT_PATH"]),
        key=Path(names["WORKER_KEY_PATH"]),
    )


async def measure(runs: int, directory: Path) -> None:
    """Print the tables."""
    (directory / "bundle").mkdir()
    (directory / "service").mkdir()
    bundle = Bundle(directory / "bundle")
    limits = {"worker": {"max_concurrent_jobs": 64}}
    async with open_embedded(directory / "service", limits) as service:
        launcher = LauncherSide(directory / "launcher", ECHO)
        host, port = service.address.rsplit(":", 1)
        async with trio_websocket.open_websocket(
            host,
            int(port),
            "/",
            use_ssl=tls_for(service),
            subprotocols=["jobworker.v1"],
            message_queue_size=1024,
        ) as socket:
            connection = Connection(socket)
            peers: dict[str, Timer] = {
                "posix_spawn": lambda: time_process(ECHO),
                "bwrap": lambda: time_process([*BWRAP, *ECHO]),
                "crun": bundle.crun,
                "runc": bundle.runc,
                "firejail": lambda: time_process([*FIREJAIL, *ECHO]),
            }
            await print_latencies(runs, peers, launcher.time, connection)
            rated = {name: peers[name] for name in ("bwrap", "crun", "runc")}
            await print_throughput(service, connection, rated)
            await print_memory(service, connection)
            await print_stop(connection, launcher)
            launcher.close()
            bundle.close()


async def print_latencies(
    runs: int, peers: dict[str, Timer], launcher: Timer, connection: Connection
) -> None:
    """Milliseconds, and ratios to posix_spawn and to bwrap's whole run of the same round."""
    ours = {"jobworker, launcher": launcher}
    samples: dict[str, list[tuple[float, float]]] = {
        name: [] for name in (*peers, *ours, "jobworker, over the wire")
    }
    for number in range(runs + 5):
        for name, timer in (*peers.items(), *ours.items()):
            if name in ours:
                await trio.sleep(PAUSE_SECONDS)
            sample = timer()
            if number >= 5:
                samples[name].append(sample)
        await trio.sleep(PAUSE_SECONDS)
        sample = await connection.run_job()
        if number >= 5:
            samples["jobworker, over the wire"].append(sample)
    print(f"start to first output byte, and whole run; ms, {runs} rounds")
    columns = f"{'first p50':>10}{'p99':>8}{'whole p50':>11}{'p99':>8}"
    print(f"{'':26}{columns}{'first/spawn':>13}{'first/bwrap whole':>19}")
    for name, rows in samples.items():
        firsts, wholes = sorted(r[0] for r in rows), sorted(r[1] for r in rows)
        to_spawn = median_ratio(rows, samples["posix_spawn"], of=0)
        to_bwrap = median_ratio(rows, samples["bwrap"], of=1)
        p99 = int(len(rows) * 0.99) - 1
        print(
            f"{name:26}{statistics.median(firsts) * 1e3:10.2f}{firsts[p99] * 1e3:8.2f}"
            f"{statistics.median(wholes) * 1e3:11.2f}{wholes[p99] * 1e3:8.2f}"
            f"{to_spawn:13.2f}{to_bwrap:19.2f}"
        )


def median_ratio(
    rows: list[tuple[float, float]], peers: list[tuple[float, float]], *, of: int
) -> float:
    """First byte of ours to the peer's first byte (0) or end (1), round by round."""
    return statistics.median(row[0] / peer[of] for row, peer in zip(rows, peers, strict=True))


async def print_throughput(
    service: EmbeddedService, connection: Connection, peers: dict[str, Timer]
) -> None:
    """Jobs per second, from request to the notice of the end."""
    print("\njobs per second, request to end, 200 each")
    for name, timer in peers.items():
        began = time.perf_counter()
        for _ in range(200):
            timer()
        print(f"  {name + ', one after another':30}{200 / (time.perf_counter() - began):8.0f}")
    began = time.perf_counter()
    for _ in range(200):
        await connection.run_job()
    print(f"  jobworker, one after another  {200 / (time.perf_counter() - began):8.0f}")
    for concurrency in (8, 32):
        rate = await concurrent_rate(service, concurrency)
        print(f"  jobworker, {concurrency:2} at a time        {rate:8.0f}")


def pss_kilobytes(pid: int) -> int:
    """Proportional set size of a process: proc_pid_smaps(5). 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def family(pid: int) -> list[int]:
    """A process and all its descendants, without those that end meanwhile."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


async def print_memory(service: EmbeddedService, connection: Connection) -> None:
    """What a running job costs beyond its own process, spares and shared pages counted."""
    before = sum(map(pss_kilobytes, family(service.process.pid)))
    command = ("sh", "-c", "echo up; exec sleep 999")
    jobs = [await connection.start_job(*command) for _ in range(SLEEPERS)]
    await trio.sleep(1)  # spares are made again
    processes = family(service.process.pid)
    own = sum(pss_kilobytes(pid) for pid in processes if _is_sleeper(pid))
    after = sum(map(pss_kilobytes, processes))
    for job in jobs:
        await connection.call("job.stop", id=job, signal="KILL", grace_seconds=0)
    beyond = (after - before - own) / SLEEPERS
    print(f"\nmemory of {SLEEPERS} sleeping jobs, PSS for each: own {own / SLEEPERS:.0f} KB,")
    print(f"  beyond that (service, launcher, spares) {beyond:.0f} KB")


def _is_sleeper(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep\0")
    except (FileNotFoundError, ProcessLookupError):
        return False


async def print_stop(connection: Connection, launcher: LauncherSide) -> None:
    """From the request to kill to the notice that nothing is left."""
    command = ["/bin/sh", "-c", _DAEMONS]
    times = [launcher.time_kill(command) * 1e3 for _ in range(20)]
    print(f"\nkill of a job with {DESCENDANTS} daemonised descendants, ms: launcher p50 ", end="")
    print(f"{statistics.median(times):.0f}, longest {max(times):.0f}; over the wire ", end="")
    samples = []
    for _ in range(20):
        job = await connection.start_job(*command)
        began = time.perf_counter()
        await connection.call("job.stop", id=job, signal="KILL", grace_seconds=0)
        samples.append((time.perf_counter() - began) * 1e3)
    print(f"p50 {statistics.median(samples):.0f}, longest {max(samples):.0f}")


async def concurrent_rate(service: EmbeddedService, concurrency: int) -> float:
    """Jobs per second over `concurrency` connections."""
    host, port = service.address.rsplit(":", 1)
    left = 200

    async def work(socket: trio_websocket.WebSocketConnection) -> None:
        nonlocal left
        connection = Connection(socket)
        while left > 0:
            left -= 1
            await connection.run_job()

    async with trio.open_nursery() as connections:
        sockets = [
            await trio_websocket.connect_websocket(
                connections,
                host,
                int(port),
                "/",
                use_ssl=tls_for(service),
                subprotocols=["jobworker.v1"],
                message_queue_size=64,
            )
            for _ in range(concurrency)
        ]
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for socket in sockets:
                nursery.start_soon(work, socket)
        seconds = time.perf_counter() - began
        for socket in sockets:
            await socket.aclose()
    return 200 / seconds


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="jobworker-bench-", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        trio.run(measure, arguments.runs, directory)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
