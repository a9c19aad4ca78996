"""How fast output travels, beside other means in the same run.

    python -m bench.output [throughput|fanout|writing|latency|answers …]

Rounds take turns, so that a drifting machine drifts for all alike; quote the ratios. Needs root,
and grpcio (`make bench-output` installs it).

    throughput  one follower, 256 MiB over mutual TLS: our client, a raw pair of TLS sockets, gRPC
    fanout      1,000 lines a second to 1, 50, 200 and 1,000 followers
    writing     what a job that writes 1 GiB costs a service without followers
    latency     from the job's write to the follower's first byte, on an idle server
    answers     how soon the service answers while a job floods a disk that is kept busy
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import trio
from bench.output_rivals import RECEIVE, rival

import jobworker
from jobworker.cli.worker.embedded_service import EmbeddedService, open_embedded
from jobworker.client.client import Client

SETTINGS: dict[str, dict[str, object]] = {
    "worker": {"default_cpu_limit": 0},
    "limits": {
        "max_connections": 2000,
        "max_connections_per_certificate": 2000,
        "max_handshakes": 2000,
        "ping_interval": "0",
    },
}
MIB = 1 << 20
TOTAL = 256 * MIB
ROUNDS = 5
GRPC_CHUNKS = (64 << 10, 256 << 10, MIB)
RAW_CHUNKS = (64 << 10, 256 << 10)
TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def memory_bytes(pid: int) -> int:
    """Proportional set size of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("smaps_rollup has no Pss")


def open_client(service: EmbeddedService) -> "AbstractAsyncContextManager[Client]":
    files = service.environment()
    return jobworker.open_client(
        service.address,
        ca=files["WORKER_CA_PATH"],
        certificate=files["WORKER_CERT_PATH"],
        key=files["WORKER_KEY_PATH"],
    )


async def throughput(service: EmbeddedService) -> None:
    certs = service.directory / "certs"
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[tuple[float, float]]] = {}

    async def measure(name: str, server: int, receive: Callable[[], Awaitable[int]]) -> None:
        server_before, client_before = cpu_seconds(server), time.process_time()
        began = time.perf_counter()
        got = await receive()
        rates.setdefault(name, []).append(got / MIB / (time.perf_counter() - began))
        costs.setdefault(name, []).append(
            (cpu_seconds(server) - server_before, time.process_time() - client_before)
        )
        assert got == TOTAL

    async with open_client(service) as client:
        job = await client.run(["head", "-c", str(TOTAL), "/dev/zero"])
        await job.wait()

        async def ours() -> int:
            got = 0
            with client.job(job.id).output() as output:
                async for chunk in output:
                    got += len(chunk.data)
            return got

        for _ in range(ROUNDS):
            for kind, chunks in (("raw", RAW_CHUNKS), ("grpc", GRPC_CHUNKS)):
                for chunk in chunks:
                    with rival(kind, certs, TOTAL, chunk) as (pid, port):
                        receive = partial(RECEIVE[kind], certs, port, TOTAL)
                        theirs = partial(trio.to_thread.run_sync, receive)
                        await measure(f"{kind} {chunk >> 10} KiB", pid, theirs)
            await measure("jobworker", service.process.pid, ours)
    print(f"{'256 MiB to one follower':28} {'MB/s':>8} {'server s':>9} {'client s':>9}")
    for name, values in rates.items():
        server = statistics.median(cost[0] for cost in costs[name])
        mine = statistics.median(cost[1] for cost in costs[name])
        rate = statistics.median(values) * 1.048576
        print(f"{name:28} {rate:8.0f} {server:9.2f} {mine:9.2f}")
    best = {
        kind: max(statistics.median(v) for n, v in rates.items() if n.startswith(kind))
        for kind in ("raw", "grpc")
    }
    mine = statistics.median(rates["jobworker"])
    print(f"ours / raw {mine / best['raw']:.2f}, ours / gRPC {mine / best['grpc']:.2f}")


LINES, LINES_PER_SECOND, LINE_BYTES = 5000, 1000, 101
WRITER = f"""
import os, sys, time
begin = int(sys.argv[1]) / 1e9
for number in range({LINES}):
    pause = begin + number / {LINES_PER_SECOND} - time.monotonic()
    if pause > 0:
        time.sleep(pause)
    os.write(1, b"%08d %020d %s\\n" % (number, time.monotonic_ns(), b"x" * 70))
"""
FOLLOWERS = Path(__file__).with_name("output_followers.py")


async def fan_out(service: EmbeddedService) -> None:
    """Every follower has a connection of its own, all of them one lean process."""
    server, certs = service.process.pid, service.directory / "certs"
    print("followers   p50 ms   p99 ms  behind ms  server CPU  ns/byte  KiB each  pieces")
    per_byte: dict[int, float] = {}
    for count in (1, 50, 200, 1000):
        before = memory_bytes(server)
        argv = [sys.executable, str(FOLLOWERS), service.address, str(certs)]
        process = await trio.lowlevel.open_process(
            [*argv, str(count), str(LINE_BYTES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        while not said.endswith(b"\n"):
            said += await process.stdout.receive_some()
        memory = (memory_bytes(server) - before) / count / 1024
        async with open_client(service) as client:
            begin_ns = time.monotonic_ns() + (3 * 10**9 + count * 15 * 10**6)
            job = await client.run(["python3", "-c", WRITER, str(begin_ns)])
            await process.stdin.send_all(b"%d\n" % job.id)
            await trio.sleep((begin_ns - time.monotonic_ns()) / 1e9 - 0.2)
            cpu, began = cpu_seconds(server), time.monotonic()
            record = await job.wait()
            ended = time.monotonic()
            told = json.loads(b"".join([data async for data in process.stdout]))
            behind = time.monotonic() - ended
        cpu = cpu_seconds(server) - cpu
        assert [size for size, _ in told["got"]] == [record.stdout_bytes], "not every byte"
        per_byte[count] = cpu * 1e9 / (count * LINES * LINE_BYTES)
        print(
            f"{count:9} {told['p50_ms']:8.1f} {told['p99_ms']:8.1f} {behind * 1e3:10.0f}"
            f" {100 * cpu / (ended - began):10.0f}% {per_byte[count]:8.0f} {memory:9.0f}"
            f" {told['pieces']:7}"
        )
    print(f"server CPU per byte, 200 followers / 1: {per_byte[200] / per_byte[1]:.2f}")


def splice_seconds(path: Path) -> float:
    """What the kernel takes to copy 1 GiB from a pipe into the page cache."""
    reading, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, MIB)
    writer = subprocess.Popen(["head", "-c", str(1 << 30), "/dev/zero"], stdout=write)
    os.close(write)
    with path.open("wb") as file:
        offset, before = 0, time.thread_time()
        while moved := os.splice(reading, file.fileno(), MIB, offset_dst=offset):
            offset += moved
        took = time.thread_time() - before
    os.close(reading)
    writer.wait()
    path.unlink()
    return took


async def writing(service: EmbeddedService) -> None:
    """The pump alone: splice(2) from pipe to file."""
    costs, floors = [], []
    async with open_client(service) as client:
        for _ in range(5):
            floor = service.directory / "floor"
            floors.append(await trio.to_thread.run_sync(splice_seconds, floor))
            before = cpu_seconds(service.process.pid)
            record = await (await client.run(["head", "-c", str(1 << 30), "/dev/zero"])).wait()
            assert record.stdout_bytes == 1 << 30
            costs.append(cpu_seconds(service.process.pid) - before)
            await client.job(record.id).remove()
    print(
        f"1 GiB written, no follower: {statistics.median(costs):.2f} s of the service's CPU; "
        f"splice(2) alone, pipe to file: {statistics.median(floors):.2f} s"
    )


STAMPER = """
import os, sys, time
for _ in range(200):
    time.sleep(0.02)
    os.write(1, b"%d\\n" % time.monotonic_ns())
"""


async def latency(service: EmbeddedService) -> None:
    """Both processes read CLOCK_MONOTONIC, which is the host's."""
    delays = []
    async with open_client(service) as client:
        job = await client.run(["python3", "-c", STAMPER], follow=True)
        async for chunk in job.output():
            now_ns = time.monotonic_ns()
            delays += [now_ns - int(stamp) for stamp in chunk.data.split()]
    delays.sort()
    print(
        f"from the job's write to the follower: p50 {delays[100] / 1e6:.2f} ms, "
        f"p99 {delays[197] / 1e6:.2f} ms"
    )


async def answers(service: EmbeddedService) -> None:
    """A flood of output, and a program that has the disk write everything out again and again."""
    delays: list[float] = []
    syncing = "import os\nwhile True: os.sync()"
    async with open_client(service) as client, trio.open_nursery() as nursery:
        syncer = await trio.lowlevel.open_process([sys.executable, "-c", syncing])
        flood = await client.run(["head", "-c", str(2 << 30), "/dev/zero"])
        ended = trio.Event()

        async def wait() -> None:
            await flood.wait()
            ended.set()

        nursery.start_soon(wait)
        while not ended.is_set():
            began = time.perf_counter()
            await client.hello()
            delays.append(time.perf_counter() - began)
            await trio.sleep(0.002)
        syncer.kill()
        await syncer.wait()
        await client.job(flood.id).remove()
    delays.sort()
    print(
        f"answers while a job floods the disk: p50 {delays[len(delays) // 2] * 1e3:.1f} ms, "
        f"p99 {delays[len(delays) * 99 // 100] * 1e3:.1f} ms, most {delays[-1] * 1e3:.0f} ms"
    )


PARTS: dict[str, Callable[[EmbeddedService], Awaitable[None]]] = {
    "throughput": throughput,
    "fanout": fan_out,
    "writing": writing,
    "latency": latency,
    "answers": answers,
}


async def main(parts: list[str]) -> None:
    for part in parts or list(PARTS):
        with tempfile.TemporaryDirectory(prefix="jobworker-bench-", dir="/var/tmp") as directory:
            async with open_embedded(Path(directory), SETTINGS) as service:
                await PARTS[part](service)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*")
    if os.geteuid() != 0:
        sys.exit("output: needs root")
    trio.run(main, parser.parse_args().parts)
