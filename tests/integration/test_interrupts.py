"""Ctrl-C between a request and its answer: what may have been done is told.

The server here takes requests, and answers those that the test has it answer.
"""

import os
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from tempfile import TemporaryFile
from typing import IO

import pytest
import trio
import trio_websocket
from attrs import define, evolve, field

from jobworker.cli.worker.embedded_service import program
from jobworker.cli.worker_cli.jobs import CALLS_AT_A_TIME
from jobworker.errors import NotFound, ShuttingDown
from jobworker.model.job import JobId
from jobworker.model.lifecycle import State
from jobworker.pki.administration import init_authority
from jobworker.protocol import messages as m
from jobworker.protocol.session import RpcRequest, ServerSession

from ..unit.client.memory_servers import RECORD
from .test_dial import Site, listening, over_tls, upgraded


@define(eq=False)
class Peer:
    """The server's end of the connection."""

    _websocket: trio_websocket.WebSocketConnection
    session: ServerSession = field(factory=ServerSession)

    async def call(self) -> RpcRequest:
        """The client's next call."""
        received = self.session.receive(await self._websocket.get_message())
        assert isinstance(received, RpcRequest)
        return received

    async def send(self, message: str) -> None:
        """Send a message, and see the client take it."""
        await self._websocket.send_message(message)
        await self._websocket.ping()

    async def refuse(self, call: RpcRequest, why: str) -> None:
        await self.send(self.session.error(call.id, NotFound(why)))


Play = Callable[[Peer], Awaitable[object]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    directory = tmp_path_factory.mktemp("site") / "certs"
    init_authority(directory, [], now=datetime.now(UTC))
    return Site(directory)


def told(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


async def interrupted(site: Site, play: Play, *arguments: str) -> tuple[str, list[str]]:
    """What a command prints, on both outputs, that Ctrl-C ends when the server has played."""
    played = trio.Event()

    async def use(websocket: trio_websocket.WebSocketConnection) -> None:
        await play(Peer(websocket))
        played.set()
        with pytest.raises(trio_websocket.ConnectionClosed):
            await websocket.get_message()

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await upgraded(stream, use)

    files = site.files()
    environment = {
        **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "WORKER_CA_PATH": str(files["ca"]),
        "WORKER_CERT_PATH": str(files["certificate"]),
        "WORKER_KEY_PATH": str(files["key"]),
    }
    with TemporaryFile() as out, TemporaryFile() as err, trio.fail_after(60):
        server = listening(over_tls(site.server(), serve))
        async with server as address, trio.open_nursery() as nursery:
            run = partial(
                trio.run_process,
                [*program("worker-cli"), *arguments],
                env={**environment, "WORKER_SERVER": str(address)},
                stdout=out.fileno(),
                stderr=err.fileno(),
                check=False,
            )
            process: trio.Process = await nursery.start(run)
            await played.wait()
            process.send_signal(signal.SIGINT)
        assert process.returncode == 130, told(err)
        return told(out), told(err).splitlines()


async def leave_open(peer: Peer) -> None:
    await peer.call()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "run true",
            "the job may have been started: see `worker-cli list` before running it again",
        ),
        ("run -q true", "the job may have been started: see `worker-cli list` before"),
        ("run -f true", "the job may have been started: see `worker-cli list` before"),
        ("rm 7", "job 7 may have been removed: see `worker-cli list`"),
        ("prune", "output may have been removed: see `worker-cli status JOB` for each job"),
        (
            "volume create --size=64M cache",
            "the volume cache may have been made: see `worker-cli volume list`",
        ),
        ("volume rm a", "the volume a may have been removed: see `worker-cli volume list`"),
    ],
)
async def test_change_that_is_not_answered_may_have_been_made(
    site: Site, arguments: str, words: str
) -> None:
    out, lines = await interrupted(site, leave_open, *arguments.split())
    assert out == ""
    (line,) = lines
    assert line.startswith(f"worker-cli: interrupted: {words}")


async def test_what_was_answered_before_is_told_and_the_rest_is_not_asked_for(site: Site) -> None:
    async def play(peer: Peer) -> None:
        removed = m.Removed(jobs=(JobId(1),), bytes=0)
        await peer.send(peer.session.result((await peer.call()).id, removed))
        await peer.call()

    out, lines = await interrupted(site, play, "rm", "1", "2", "3")
    assert out == "1\n"
    assert lines == ["worker-cli: interrupted: job 2 may have been removed: see `worker-cli list`"]


async def test_stop_tells_what_has_come_and_names_the_jobs_that_are_being_stopped(
    site: Site,
) -> None:
    async def play(peer: Peer) -> None:
        calls: dict[int, RpcRequest] = {}
        while len(calls) < 4:
            call = await peer.call()
            assert isinstance(call.params, m.StopParams)
            calls[call.params.id] = call
        ended = evolve(RECORD, id=JobId(4), state=State.STOPPED)
        await peer.send(peer.session.result(calls[JobId(4)].id, ended))
        await peer.refuse(calls[JobId(999)], "cannot find job 999: no such job")

    out, lines = await interrupted(site, play, "stop", "3", "999", "4", "5", "3")
    assert out == "job 4: STOPPED\n"
    assert lines == [
        "worker-cli: cannot find job 999: no such job",
        "the server goes on with the stop: worker-cli wait 3 5",
    ]


async def test_stop_names_the_jobs_that_were_not_asked_to(site: Site) -> None:
    asked = set[int]()  # Trio chooses whose turn comes first

    async def play(peer: Peer) -> None:
        for _ in range(CALLS_AT_A_TIME):
            params = (await peer.call()).params
            assert isinstance(params, m.StopParams)
            asked.add(params.id)

    jobs = range(1, CALLS_AT_A_TIME + 4)
    out, lines = await interrupted(site, play, "stop", *map(str, jobs))
    assert out == ""
    under_way = " ".join(str(job) for job in jobs if job in asked)
    passed_over = " ".join(str(job) for job in jobs if job not in asked)
    assert lines == [
        f"the server goes on with the stop: worker-cli wait {under_way}",
        f"not asked to stop: {passed_over}",
    ]


async def test_stop_that_a_service_on_its_way_out_refused_is_not_under_way(site: Site) -> None:
    async def play(peer: Peer) -> None:
        call = await peer.call()
        await peer.send(peer.session.error(call.id, ShuttingDown("cannot stop job 3: I end")))

    _, lines = await interrupted(site, play, "stop", "3")
    assert lines == ["not asked to stop: 3"]


async def test_wait_tells_what_has_come(site: Site) -> None:
    async def play(peer: Peer) -> None:
        calls: dict[int, RpcRequest] = {}
        while len(calls) < 2:
            call = await peer.call()
            assert isinstance(call.params, m.JobParams)
            calls[call.params.id] = call
        await peer.refuse(calls[JobId(999)], "cannot find job 999: no such job")

    _, lines = await interrupted(site, play, "wait", "3", "999")
    assert "worker-cli: cannot find job 999: no such job" in lines
