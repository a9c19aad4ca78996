"""How long a job takes to start, beside bubblewrap and crun in the same run.

    python bench/start_latency.py [--runs 200]

Each round starts one of each in turn, so that a drifting machine drifts for all alike; quote
the ratios. For jobworker the clock runs from `job.run` with follow on an open connection (mutual
TLS, WebSocket, JSON) to the first output byte at the client; for the others from posix_spawn(3) to
the first byte on the pipe, and to the end of the process ("whole"). All run `/usr/bin/echo x`:

    posix_spawn   nothing around it
    bwrap         namespaces, read-only /usr, /proc, /dev; no limits, no filter
    crun          an OCI bundle with a read-only root; no limits (its cgroup manager is off,
                  since it does not take hybrid hierarchies)
    jobworker     namespaces, user namespace, private root, limits on CPU, memory and processes

Needs root, and bubblewrap and crun (`make bench` installs them).
"""

import argparse
import json
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio
import trio_websocket

from jobworker.cli.embedded import Embedded, open_embedded
from jobworker.pki.tls import client_context
from jobworker.sandbox import syscalls as sc

ECHO = ["/usr/bin/echo", "x"]
BWRAP = [
    *("bwrap", "--unshare-all", "--share-net", "--die-with-parent", "--new-session"),
    *("--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib"),
    *("--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin"),
    *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
]
PAUSE_SECONDS = 0.06
"""Between rounds: a server that starts a job now and then, not a busy one."""

Timer = Callable[[], tuple[float, float]]


def time_process(argv: list[str], cwd: str | None = None) -> tuple[float, float]:
    """Seconds to the first byte and to the end of a program."""
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=cwd) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        at_first = time.perf_counter() - began
        assert first == b"x", f"{argv[0]} printed {first!r}"
        process.stdout.read()
    return at_first, time.perf_counter() - began


class Crun:
    """A helper process in a mount namespace where crun finds nothing but cgroup2."""

    def __init__(self, bundle: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--crun", str(bundle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self) -> tuple[float, float]:
        """See `time_process`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        first, whole = map(float, self._process.stdout.readline().split())
        return first, whole

    def close(self) -> None:
        """End the helper."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve_crun(bundle: Path) -> None:
    """The helper: one timed run for each line of input."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    if Path("/sys/fs/cgroup/unified").is_dir():
        sc.mount("/sys/fs/cgroup/unified", "/sys/fs/cgroup", None, sc.MS_BIND)
    for number, _ in enumerate(sys.stdin):
        name = f"bench-{os.getpid()}-{number}"
        argv = ["crun", "--cgroup-manager=disabled", "run", name]
        first, whole = time_process(argv, str(bundle))
        print(first, whole, flush=True)


def make_bundle(directory: Path) -> Path:
    """An OCI bundle whose root is the host's /usr, read-only."""
    root = directory / "rootfs"
    for name in ("usr", "proc", "dev", "sys"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    subprocess.run(["crun", "spec"], cwd=directory, check=True)
    config = json.loads((directory / "config.json").read_text())
    config["process"].update(terminal=False, args=ECHO)
    config["root"] = {"path": "rootfs", "readonly": True}
    config["linux"].pop("resources", None)
    config["mounts"].append(
        {
            "destination": "/usr",
            "type": "bind",
            "source": "/usr",
            "options": ["rbind", "ro"],
        }
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class Connection:
    """A bare client: what any WebSocket library could do."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self._socket, self._calls = socket, 0

    async def run_job(self) -> tuple[float, float]:
        """Seconds to the first output byte, and to the notice of the job's end."""
        self._calls += 1
        params = {"job": {"command": ECHO}, "follow": {}}
        request = {"jsonrpc": "2.0", "id": self._calls, "method": "job.run", "params": params}
        first = 0.0
        began = time.perf_counter()
        await self._socket.send_message(json.dumps(request))
        while True:
            message = json.loads(await self._socket.get_message())
            assert "error" not in message, message
            if message.get("method") == "job.output":
                first = time.perf_counter() - began
            elif message.get("method") == "job.output_end":
                return first, time.perf_counter() - began


def tls_for(service: Embedded) -> ssl.SSLContext:
    """The admin's certificate."""
    names = service.environment()
    return client_context(
        ca=Path(names["WORKER_CA_PATH"]),
        certificate=Path(names["WORKER_CERT_PATH"]),
        key=Path(names["WORKER_KEY_PATH"]),
    )


async def measure(runs: int, directory: Path) -> None:
    """Print the tables."""
    crun = Crun(make_bundle(directory / "bundle"))
    limits = {"worker": {"max_concurrent_jobs": 64}}
    (directory / "service").mkdir()
    async with open_embedded(directory / "service", limits) as service:
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
                "crun": crun.time,
            }
            samples: dict[str, list[tuple[float, float]]] = {
                name: [] for name in (*peers, "jobworker")
            }
            for number in range(runs + 5):
                for name, timer in peers.items():
                    sample = timer()
                    if number >= 5:
                        samples[name].append(sample)
                await trio.sleep(PAUSE_SECONDS)
                sample = await connection.run_job()
                if number >= 5:
                    samples["jobworker"].append(sample)
            print_latencies(samples, runs)
            await print_throughput(service, connection, {n: peers[n] for n in ("bwrap", "crun")})
            crun.close()


def print_latencies(samples: dict[str, list[tuple[float, float]]], runs: int) -> None:
    """Milliseconds, and ratios to bwrap's whole run of the same round."""
    print(f"start to first output byte, and whole run; ms, {runs} rounds")
    print(f"{'':14}{'first p50':>10}{'p99':>8}{'whole p50':>11}{'p99':>8}{'first/bwrap whole':>19}")
    for name, rows in samples.items():
        firsts, wholes = sorted(r[0] for r in rows), sorted(r[1] for r in rows)
        ratio = statistics.median(
            row[0] / peer[1] for row, peer in zip(rows, samples["bwrap"], strict=True)
        )
        p99 = int(len(rows) * 0.99) - 1
        print(
            f"{name:14}{statistics.median(firsts) * 1e3:10.2f}{firsts[p99] * 1e3:8.2f}"
            f"{statistics.median(wholes) * 1e3:11.2f}{wholes[p99] * 1e3:8.2f}{ratio:19.2f}"
        )
    beyond = 1e3 * statistics.median(
        row[0] - peer[1] for row, peer in zip(samples["jobworker"], samples["bwrap"], strict=True)
    )
    print(f"jobworker's first byte over the wire is {beyond:+.1f} ms from bwrap's whole run (p50)")


async def print_throughput(
    service: Embedded, connection: Connection, peers: dict[str, Timer]
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


async def concurrent_rate(service: Embedded, concurrency: int) -> float:
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
    parser.add_argument("--crun", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.crun is not None:
        serve_crun(arguments.crun)
        return
    directory = Path(tempfile.mkdtemp(prefix="jobworker-bench-", dir="/var/tmp"))
    directory.chmod(0o755)
    (directory / "bundle").mkdir()
    try:
        trio.run(measure, arguments.runs, directory)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
