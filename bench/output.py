"""How fast output travels, beside other means in the same run.

    python -m bench.output [throughput|fanout|writing|latency|disk …]

Rounds take turns, so that a drifting machine drifts for all alike; quote the ratios. Needs root,
and grpcio (`make bench-output` installs it).

    throughput  one follower, 256 MiB over mutual TLS: our client, a raw pair of TLS sockets, gRPC
    fanout      1,000 lines a second to 1, 50, 200 and 1,000 followers
    writing     what a job that writes 1 GiB costs a service without followers
    latency     from the job's write to the follower's first byte, on an idle server
    disk        how long the service's loop is held up while a job floods a throttled disk
"""

import argparse
import os
import statistics
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
from jobworker.cli.embedded import Embedded, open_embedded
from jobworker.client.client import Client

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


def open_client(service: Embedded) -> "AbstractAsyncContextManager[Client]":
    files = service.environment()
    return jobworker.open_client(
        service.address,
        ca=files["WORKER_CA_PATH"],
        certificate=files["WORKER_CERT_PATH"],
        key=files["WORKER_KEY_PATH"],
    )


async def throughput(service: Embedded) -> None:
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


PARTS: dict[str, Callable[[Embedded], Awaitable[None]]] = {"throughput": throughput}


async def main(parts: list[str]) -> None:
    for part in parts or list(PARTS):
        with tempfile.TemporaryDirectory(prefix="jobworker-bench-", dir="/var/tmp") as directory:
            async with open_embedded(Path(directory)) as service:
                await PARTS[part](service)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*")
    if os.geteuid() != 0:
        sys.exit("output: needs root")
    trio.run(main, parser.parse_args().parts)
