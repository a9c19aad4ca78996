"""`worker-cli log` and what stands behind it: where it begins, what it shows, how it goes on."""

import os
import pty
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from attrs import define

from jobworker.cli.worker.embedded_service import EmbeddedService, program

from ..services import open_embedded
from .wire import Json, Refused, Wire, open_wire


async def log_of(admin: Wire, job: object, **params: object) -> tuple[bytes, bytes]:
    result = await admin.call("job.log", id=job, **params)
    out, err, _ = await admin.output(result["subscription"])
    return out, err


async def test_tail_begins_with_the_last_lines(admin: Wire) -> None:
    _, _, job = await admin.run("sh", "-c", "seq 1 5; printf 'six\\nseven'")
    assert await log_of(admin, job["id"], tail_lines=2) == (b"six\nseven", b"")
    assert await log_of(admin, job["id"], tail_lines=0) == (b"", b"")
    assert await log_of(admin, job["id"], tail_lines=1, streams=["stderr"]) == (b"", b"")
    assert await log_of(admin, job["id"], tail_lines=99, offset=4) == (
        b"3\n4\n5\nsix\nseven",
        b"",
    )


async def test_since_begins_with_what_was_written_then(admin: Wire) -> None:
    result = await admin.call(
        "job.run", job={"command": ["sh", "-c", "echo one; read x < /dev/zero; sleep 600"]}
    )
    job = result["job"]["id"]  # type: ignore[index]
    with trio.fail_after(60):
        while not (await log_of(admin, job, follow=False))[0]:
            pass
    between = datetime.now(UTC)
    await admin.call("job.stop", id=job)
    assert await log_of(admin, job, since=between.isoformat()) == (b"", b"")
    assert await log_of(admin, job, since="2020-01-01T00:00:00Z") == (b"one\n", b"")
    assert await log_of(admin, job, since_seconds=3600) == (b"one\n", b"")
    with pytest.raises(Refused, match="cannot follow the job: streams: is empty"):
        await admin.call("job.log", id=job, streams=[])


async def test_job_may_end_or_go_whenever_somebody_asks_for_it(admin: Wire) -> None:
    """Nothing but the truth of some moment comes of it, and no internal fault."""
    names = set[str]()

    async def ask(method: str, job: int, **params: object) -> None:
        for _ in range(8):
            try:
                result = await admin.call(method, id=job, **params)
                if method == "job.log":
                    await admin.notify("job.unfollow", subscription=result["subscription"])
            except Refused as error:
                names.add(str(error.data["name"]))  # type: ignore[index]
            await trio.lowlevel.checkpoint()

    for _ in range(12):
        job = await admin.start("sh", "-c", "seq 2000; echo no newline >&2")
        async with trio.open_nursery() as nursery:
            for params in ({"tail_lines": 3}, {"since_seconds": 1}, {"tail_lines": 9, "offset": 1}):
                nursery.start_soon(partial(ask, "job.log", job, **params))
            nursery.start_soon(ask, "job.status", job)
            nursery.start_soon(ask, "job.wait", job)
            await admin.call("job.wait", id=job)
            nursery.start_soon(partial(ask, "job.remove", job, force=True))
    assert names <= {"not_found", "invalid_params"}


async def test_result_tells_where_it_begins(admin: Wire) -> None:
    _, _, job = await admin.run("sh", "-c", "seq 1 5")
    result = await admin.call("job.log", id=job["id"], tail_lines=0)
    assert result["offset"] == 10


async def test_stalled_follower_is_let_go_and_can_come_back(
    open_directory: Callable[[], Path],
) -> None:
    impatient = open_embedded(open_directory(), {"server": {"stall_timeout": "100ms"}})
    async with impatient as service, open_wire(service) as admin:
        _, _, job = await admin.run("sh", "-c", "head -c 300000 /dev/zero")
        result = await admin.call("job.log", id=job["id"], delivery={"credit_bytes": 1000})
        notes = admin.notes(result["subscription"])
        first, end = await notes.receive(), await notes.receive()
        assert end["method"] == "job.output_end"
        params = end["params"]
        assert isinstance(params, dict)
        assert params["error"]["name"] == "follower_stalled"
        assert params["offset"] == 1000
        assert first["method"] == "job.output"
        out, _ = await log_of(admin, job["id"], offset=params["offset"])
        assert len(out) == 299_000


async def test_what_is_written_before_a_time_to_come_is_not_shown(admin: Wire) -> None:
    script = "trap 'echo late; exit' TERM; echo early; while :; do sleep 0.05; done"
    job = await admin.start("sh", "-c", script)
    with trio.fail_after(30):
        while not (await log_of(admin, job, follow=False))[0]:
            pass
    opened = [
        await admin.call("job.log", id=job, since=moment)
        for moment in ("2999-01-01T00:00:00Z", "2020-01-01T00:00:00Z")
    ]
    await admin.call("job.stop", id=job, grace_seconds=30)
    seen = [(await admin.output(each["subscription"]))[0] for each in opened]
    assert seen == [b"", b"early\nlate\n"]


# --- the command line -----------------------------------------------------------------------


def call(
    service: EmbeddedService, *arguments: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **service.environment(), **variables}
    return subprocess.run(
        [*program("worker-cli"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_log_shows_what_is_asked_for(service: EmbeddedService, admin: Wire) -> None:
    _, _, record = await admin.run("sh", "-c", "seq 1 3; echo err >&2")
    job = str(record["id"])

    def log(*options: str) -> tuple[str, str, int]:
        done = call(service, "log", *options, job)
        return done.stdout, done.stderr, done.returncode

    ask = trio.to_thread.run_sync
    assert await ask(log) == ("1\n2\n3\n", "err\n", 0)
    assert await ask(log, "--stdout", "--tail=1") == ("3\n", "", 0)
    assert await ask(log, "-n", "1", "--stderr", "-f") == ("", "err\n", 0)
    assert await ask(log, "--stderr", "--stdout") == ("1\n2\n3\n", "err\n", 0)
    assert await ask(log, "--since=1h", "--stderr") == ("", "err\n", 0)
    assert await ask(log, "--since=2999-01-01") == ("", "", 0)
    stamped, _, _ = await ask(log, "--timestamps", "--stdout")
    assert re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z [123]\n){3}", stamped)
    _, said, code = await ask(log, "--since=yesterday")
    assert code == 2
    assert "neither a duration" in said


INTERRUPTED_LINE = """
import array, fcntl, os, termios
def write(fd, data):
    os.write(fd, data)
    left = array.array("i", [1])
    while left[0]:  # until the service has moved it from the pipe to the log
        fcntl.ioctl(fd, termios.FIONREAD, left)
write(1, b"part")
write(2, b"E")
write(1, b"ial\\nlast no newline")
"""


async def test_log_begins_with_whole_lines(service: EmbeddedService, admin: Wire) -> None:
    _, _, record = await admin.run("python3", "-c", INTERRUPTED_LINE)
    job = str(record["id"])

    def log(*options: str) -> tuple[str, str]:
        done = call(service, "log", *options, job)
        return done.stdout, done.stderr

    ask = trio.to_thread.run_sync
    assert await ask(log, "--tail=1") == ("last no newline", "")
    assert await ask(log, "--tail=2") == ("last no newline", "E")
    assert await ask(log, "--tail=3") == ("partial\nlast no newline", "E")
    whole, _ = await ask(log, "-t")
    of_part, of_last = (line.split()[0] for line in whole.splitlines())
    assert of_part < of_last
    assert await ask(log, "-t", "--tail=2", "--stdout") == (whole, "")
    out, err = await ask(log, "-t", f"--since={of_last}")
    assert (out, err) == (f"{of_last} last no newline", "")


async def test_who_goes_on_hands_back_where_streams_begin(admin: Wire) -> None:
    _, _, record = await admin.run("python3", "-c", INTERRUPTED_LINE)

    async def pieces(**params: object) -> tuple[Json, list[Json]]:
        result = await admin.call("job.log", id=record["id"], **params)
        seen = list[Json]()
        async for note in admin.notes(result["subscription"]):
            if note["method"] == "job.output_end":
                break
            params = note["params"]  # type: ignore[assignment]
            seen.append({name: params[name] for name in ("stream", "offset", "data")})
        return result, seen

    begun, all_of_it = await pieces(tail_lines=2)
    assert (begun["offset"], begun["starts"]) == (
        4,
        [{"stream": "stdout", "offset": 8, "since": None}],
    )
    assert [(each["stream"], each["offset"]) for each in all_of_it] == [
        ("stderr", 4),
        ("stdout", 9),
    ]
    for offset, rest in ((4, all_of_it), (5, all_of_it[1:])):
        assert (await pieces(offset=offset, starts=begun["starts"]))[1] == rest
    with pytest.raises(Refused, match="at most 2"):
        await admin.call("job.log", id=record["id"], starts=[{"stream": "stdout"}] * 3)


@pytest.mark.parametrize("command", ["log", "run"])
@pytest.mark.parametrize(("raw", "seen"), [(False, b"a\\x1b[2Jb\\x0dc"), (True, b"a\x1b[2Jb\rc")])
async def test_terminal_is_protected(
    service: EmbeddedService, admin: Wire, command: str, raw: bool, seen: bytes
) -> None:
    printf = ["printf", "a\\033[2Jb\\rc"]
    arguments = ["run", "-f", *(["--raw"] if raw else []), *printf]
    if command == "log":
        _, _, record = await admin.run(*printf)
        arguments = ["log", *(["--raw"] if raw else []), str(record["id"])]
    master, slave = pty.openpty()
    try:
        await trio.run_process(
            [*program("worker-cli"), *arguments],
            env={**os.environ, **service.environment()},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        assert os.read(master, 1000) == seen
    finally:
        os.close(master)
        os.close(slave)


async def test_follow_of_a_removed_job_says_so(
    service: EmbeddedService, admin: Wire, tmp_path: Path
) -> None:
    job = await admin.start("sh", "-c", "echo begun; exec sleep 600")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as output, (tmp_path / "said").open("wb+") as said:
        process = await trio.lowlevel.open_process(
            [*program("worker-cli"), "log", "-f", str(job)],
            env={**os.environ, **service.environment()},
            stdout=writing,
            stderr=said,
        )
        os.close(writing)
        with trio.fail_after(60):
            assert await trio.to_thread.run_sync(output.readline) == b"begun\n"
            await admin.call("job.remove", id=job, force=True)
            assert await process.wait() == 66
        said.seek(0)
        assert (
            said.read().decode()
            == f"worker-cli: cannot follow job {job} any more: it was removed\n"
        )


@define(eq=False)
class Proxy:
    """Hands connections on to the service; cuts the first ones in the midst of their output."""

    service: EmbeddedService
    cuts: int
    bytes_each: int
    port: int = 0
    connections: int = 0

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self.serve_one, listeners)

    async def serve_one(self, client: trio.SocketStream) -> None:
        self.connections += 1
        left = self.bytes_each if self.connections <= self.cuts else 1 << 60
        host, port = self.service.address.rsplit(":", 1)
        server = await trio.open_tcp_stream(host, int(port))
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self.copy, client, server, 1 << 60, nursery)
            nursery.start_soon(self.copy, server, client, left, nursery)

    async def copy(
        self, source: trio.SocketStream, to: trio.SocketStream, left: int, nursery: trio.Nursery
    ) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while left and (data := await source.receive_some(min(left, 65536))):
                left -= len(data)
                await to.send_all(data)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("command", "bytes_each"), [("log", 1_300_000), ("run", 1_300_000), ("log", 250_000)]
)
async def test_follow_goes_on_after_each_break(
    service: EmbeddedService, admin: Wire, command: str, bytes_each: int
) -> None:
    script = "seq 1 900000; exit 3"
    expected = "".join(f"{i}\n" for i in range(1, 900_001)).encode()
    arguments = ["run", "-f", "sh", "-c", script]
    if command == "log":
        arguments = ["log", "-f", str(await admin.start("sh", "-c", script))]
    proxy = Proxy(service, cuts=3, bytes_each=bytes_each)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.serve)
        at_proxy = {**service.environment(), "WORKER_SERVER": f"127.0.0.1:{proxy.port}"}
        done = await trio.run_process(
            [*program("worker-cli"), *arguments],
            env={**os.environ, **at_proxy},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        nursery.cancel_scope.cancel()
    assert done.returncode == (3 if command == "run" else 0), done.stderr
    assert done.stdout == expected
    assert proxy.connections == 4
    said = rb"worker-cli: the connection to 127.0.0.1:\d+ broke: .*; going on from byte (\d+)\n"
    places = [int(n) for n in re.findall(said, done.stderr)]
    assert len(places) == done.stderr.count(b" broke: ") == 3
    assert all(before < after for before, after in pairwise([0, *places]))
