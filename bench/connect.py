"""Connections and requests beside gRPC for Python, with the same mutual TLS and the same work.

    python -m bench.connect [--rounds 200] [--requests 2000]

Each side answers one small request (who are you?). Both servers run in processes of their own, on
loopback, with certificates of one authority; the rounds alternate. Printed: connect and first
request, one request after another on one connection, and requests on 100 connections at a time.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService, open_embedded
from jobworker.client.client import Client
from jobworker.client.opening import open_client

CONNECTIONS = 100
METHOD = "/bench.Service/Hello"

GRPC_SERVER = """
import asyncio, sys, grpc
ca, certificate, key = (open(path, "rb").read() for path in sys.argv[1:])
async def hello(request, context):
    return b'{"version":"1","name":"admin-client","role":"admin"}'
async def main():
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(hello)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Service", {"Hello": handler}),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(
        [(key, certificate)], ca, require_client_auth=True))
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()
asyncio.run(main())
"""


def files_of(service: EmbeddedService) -> tuple[Path, Path, Path]:
    names = service.environment()
    return tuple(Path(names[f"WORKER_{name}_PATH"]) for name in ("CA", "CERT", "KEY"))  # type: ignore[return-value]


class Grpc:
    """gRPC's side."""

    def __init__(self, service: EmbeddedService) -> None:
        certs = service.directory / "certs"
        server = [certs / "ca-cert.pem", certs / "server-cert.pem", certs / "server-key.pem"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", GRPC_SERVER, *map(str, server)], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"
        ca, certificate, key = (path.read_bytes() for path in files_of(service))
        self.credentials = grpc.ssl_channel_credentials(ca, key, certificate)

    def channel(self, module: object = grpc) -> object:
        options = [("grpc.use_local_subchannel_pool", 1)]
        return module.secure_channel(self.address, self.credentials, options)  # type: ignore[attr-defined]

    def first(self) -> float:
        began = time.perf_counter()
        with self.channel() as channel:  # type: ignore[attr-defined]
            channel.unary_unary(METHOD)(b"{}")
            return time.perf_counter() - began

    def one_after_another(self, count: int) -> list[float]:
        with self.channel() as channel:  # type: ignore[attr-defined]
            hello = channel.unary_unary(METHOD)
            hello(b"{}")
            return timed(lambda: hello(b"{}"), count)

    async def many(self, each: int) -> tuple[float, list[float]]:
        channels = [self.channel(grpc.aio) for _ in range(CONNECTIONS)]
        calls = [channel.unary_unary(METHOD) for channel in channels]  # type: ignore[attr-defined]
        await asyncio.gather(*(call(b"{}") for call in calls))
        took: list[float] = []

        async def ask(call: Callable[[bytes], object]) -> None:
            for _ in range(each):
                began = time.perf_counter()
                await call(b"{}")  # type: ignore[misc]
                took.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*map(ask, calls))
        whole = time.perf_counter() - began
        for channel in channels:
            await channel.close()  # type: ignore[attr-defined]
        return whole, took


def timed(call: Callable[[], object], count: int) -> list[float]:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return took


async def our_first(service: EmbeddedService) -> float:
    began = time.perf_counter()
    ca, certificate, key = files_of(service)
    async with open_client(service.address, ca=ca, certificate=certificate, key=key) as client:
        await client.hello()
        return time.perf_counter() - began


async def our_requests(client: Client, count: int) -> list[float]:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await client.hello()
        took.append(time.perf_counter() - began)
    return took


async def our_many(service: EmbeddedService, each: int) -> tuple[float, list[float]]:
    ca, certificate, key = files_of(service)
    took: list[float] = []
    ready, go = trio.Semaphore(0), trio.Event()

    async def one() -> None:
        async with open_client(service.address, ca=ca, certificate=certificate, key=key) as client:
            await client.hello()
            ready.release()
            await go.wait()
            took.extend(await our_requests(client, each))

    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(one)
        for _ in range(CONNECTIONS):
            await ready.acquire()
        began = time.perf_counter()
        go.set()
    return time.perf_counter() - began, took


def show(what: str, took: list[float], rate: float | None = None) -> None:
    cut = statistics.quantiles(took, n=100)
    per_second = "" if rate is None else f"{rate:8.0f}"
    print(f"| {what} | {cut[49] * 1e3:.2f} | {cut[98] * 1e3:.2f} | {per_second} |")


async def main(rounds: int, requests: int) -> None:
    directory = Path(tempfile.mkdtemp(prefix="jobworker-bench-", dir="/var/tmp"))
    os.chmod(directory, 0o755)
    try:
        async with open_embedded(directory) as service:
            rival = Grpc(service)
            try:
                await compare(service, rival, rounds, requests)
            finally:
                rival.process.kill()
                rival.process.wait()
    finally:
        shutil.rmtree(directory)


async def compare(service: EmbeddedService, rival: Grpc, rounds: int, requests: int) -> None:
    ours, theirs = list[float](), list[float]()
    for _ in range(rounds):
        ours.append(await our_first(service))
        theirs.append(await trio.to_thread.run_sync(rival.first))
    print("| | p50 ms | p99 ms | requests/s |\n|---|---|---|---|")
    show("jobworker: connect, first request, close", ours)
    show("gRPC: the same", theirs)
    ours, theirs = [], []
    ca, certificate, key = files_of(service)
    async with open_client(service.address, ca=ca, certificate=certificate, key=key) as client:
        await client.hello()
        for _ in range(10):
            ours += await our_requests(client, requests // 10)
            theirs += await trio.to_thread.run_sync(rival.one_after_another, requests // 10)
    show("jobworker: one connection, one after another", ours, len(ours) / sum(ours))
    show("gRPC: the same", theirs, len(theirs) / sum(theirs))
    each = max(2, requests // CONNECTIONS)
    whole, took = await our_many(service, each)
    show(f"jobworker: {CONNECTIONS} connections at a time", took, len(took) / whole)
    whole, took = await trio.to_thread.run_sync(lambda: asyncio.run(rival.many(each)))
    show("gRPC: the same", took, len(took) / whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    trio.run(main, arguments.rounds, arguments.requests)
