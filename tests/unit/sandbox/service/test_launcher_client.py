"""The service's side of its conversation with a launcher that the test plays."""

import array
import errno
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.errors import LauncherGone, LauncherSilent, SandboxError
from jobworker.model.job import JobId
from jobworker.sandbox import channel
from jobworker.sandbox.cgroup.accounting import ScopeLimits
from jobworker.sandbox.protocol.end_requests import EndRequest
from jobworker.sandbox.service import launcher_client
from jobworker.sandbox.service.job_reports import KeptJob
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.sandbox.start.plan import Order

from ....descriptors import descriptors

AGAIN = "the launcher answers again"


@asynccontextmanager
async def open_silent() -> AsyncIterator[tuple[LauncherClient, socket.socket]]:
    """A link whose launcher was found to answer nothing, and that launcher's end."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setblocking(False)
    with trio.socket.from_stdlib_socket(near) as sock, far:
        launcher = LauncherClient(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(launcher.serve)
            nursery.start_soon(launcher.watch_silence)
            with pytest.raises(LauncherSilent):
                await launcher.promised_bytes()
            yield launcher, far
            nursery.cancel_scope.cancel()


async def test_end_of_a_private_network_reaches_whoever_has_the_job(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Told while the service listens, or listed to the next one; unknown events are no fault."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listed = KeptJob(job=1, pid=5, since=0, exit=None, stdout=0, stderr=0)
    with trio.socket.from_stdlib_socket(near) as sock, far:
        launcher = LauncherClient(sock)
        launcher.inherit([evolve(listed, network_end="it broke"), evolve(listed, job=2)])
        channel.send(far, {"event": "of a later launcher", "job": 2})
        channel.send(far, {"event": "network_ended", "job": 2, "why": "it died"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(launcher.serve)
            with trio.fail_after(20):
                (one, exits), (two, _) = (launcher.inherited[JobId(n)] for n in (1, 2))
                assert await one.notices.receive() == "its private network ended: it broke"
                assert await two.notices.receive() == "its private network ended: it died"
            assert not exits.statistics().current_buffer_used, "it lives"
            launcher.give_up()
            with pytest.raises(trio.EndOfChannel):
                await two.notices.receive()
            nursery.cancel_scope.cancel()


async def test_message_that_is_none_leaves_no_descriptor() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trio.socket.from_stdlib_socket(near) as sock, far:
        before = descriptors()
        rights = array.array("i", [far.fileno()]).tobytes()
        far.sendmsg([b"?"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        with trio.fail_after(20):
            await LauncherClient(sock).serve()
        assert descriptors() == before


@asynccontextmanager
async def open_played() -> AsyncIterator[tuple[LauncherClient, socket.socket]]:
    """A link that listens, and the launcher's end, at which the test plays it."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setblocking(False)
    with trio.socket.from_stdlib_socket(near) as sock, far:
        launcher = LauncherClient(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(launcher.serve)
            yield launcher, far
            nursery.cancel_scope.cancel()


async def hear(far: socket.socket) -> channel.Message:
    await trio.testing.wait_all_tasks_blocked(0.01)
    received = channel.receive(far)
    assert received is not None
    return received[0]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"ok": {"bytes": "5"}}, "the reply to promised: bytes is no integer"),
        ({"ok": {}}, "the reply to promised: bytes is no integer"),
        ({}, "the reply to promised: ok is no object"),
        ({"error": {"step": "request"}}, "the reply to promised: errno is no integer"),
        ({"error": 7}, "the reply to promised: error is no object"),
    ],
)
async def test_reply_that_does_not_fit_fails_its_own_request_by_name(
    reply: channel.Message, words: str
) -> None:
    failed = []
    before = descriptors()

    async def ask(launcher: LauncherClient) -> None:
        with pytest.raises(SandboxError) as caught:
            await launcher.promised_bytes()
        failed.append(caught.value.message)

    async with open_played() as (launcher, far), trio.open_nursery() as nursery:
        nursery.start_soon(ask, launcher)
        asked = await hear(far)
        channel.send(far, {"id": asked["id"], **reply}, [far.fileno()])
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert failed == [
            f"cannot serve the request: the launcher does not keep to the protocol: {words}"
        ]
        nursery.start_soon(launcher.kill, JobId(1))
        asked = await hear(far)
        channel.send(far, {"id": asked["id"], "ok": {}})
    assert descriptors() == before


@pytest.mark.parametrize(("pid", "pipes"), [(None, 2), (7, 1), (7, 0), (7, 3)])
async def test_job_whose_start_is_answered_by_what_does_not_fit_is_removed(
    pid: int | None, pipes: int
) -> None:
    """It may run, and nobody reads from it."""
    failed = []
    before = descriptors()

    async def start(launcher: LauncherClient) -> None:
        with pytest.raises(SandboxError) as caught:
            await launcher.spawn(JobId(3), Order("job", ("true",), {}, ""), ScopeLimits())
        failed.append(caught.value)

    async with open_played() as (launcher, far), trio.open_nursery() as nursery:
        nursery.start_soon(start, launcher)
        asked = await hear(far)
        channel.send(far, {"id": asked["id"], "ok": {"pid": pid}}, [far.fileno()] * pipes)
        removal = await hear(far)
        assert (removal["op"], removal["job"]) == ("remove", 3)
        channel.send(far, {"id": removal["id"], "ok": {}})
    assert "the reply to spawn" in failed[0].message
    assert failed[0].data["may_have_run"] is True
    assert descriptors() == before


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "exit", "job": 1}, "the event exit: code is no integer"),
        ({"event": "exit", "code": 0, "signal": None}, "the event exit: job is no integer"),
        ({"event": "network_ended", "job": 1}, "the event network_ended: why is no text"),
    ],
)
async def test_event_that_does_not_fit_ends_the_conversation_by_name(
    event: channel.Message, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be the end of a job: nobody may wait for that for ever."""
    async with open_played() as (launcher, far):
        launcher.inherit([KeptJob(job=1, pid=5, since=0, exit=None, stdout=0, stderr=0)])
        channel.send(far, event)
        with trio.fail_after(20):
            await launcher.gone.wait()
            with pytest.raises(trio.EndOfChannel):
                await launcher.inherited[JobId(1)][1].receive()
            with pytest.raises(LauncherGone):
                await launcher.kill(JobId(1))
    assert f"breaks the protocol, so the service leaves it: {words}" in caplog.text


def answer_all(far: socket.socket) -> None:
    while True:
        try:
            received = channel.receive(far)
        except BlockingIOError:
            return
        assert received is not None
        channel.send(far, {"id": received[0]["id"], "ok": {}})


async def test_silent_launcher_that_answers_is_told_in_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_silent() as (launcher, far):
        with trio.fail_after(60):
            while launcher.silent:
                answer_all(far)
                await trio.sleep(0.1)
    assert AGAIN in caplog.text


async def test_silent_launcher_that_is_given_up_has_not_answered(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_silent() as (launcher, _):
        launcher.give_up()
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(LauncherSilent, match="shutting down"):
            await launcher.kill(JobId(1))
    assert AGAIN not in caplog.text


@pytest.mark.parametrize("operation", [LauncherClient.kill, LauncherClient.begin_to_remove])
async def test_requests_that_wait_for_room_in_the_socket_end_with_the_rest(
    operation: Callable[[LauncherClient, JobId], Awaitable[None]],
) -> None:
    """A launcher that reads nothing: the service's end must not wait for it."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended: list[JobId] = []
    refused: list[object] = []
    many = 2000  # the kernel takes some 300 packets
    with trio.socket.from_stdlib_socket(near) as sock, far:
        launcher = LauncherClient(sock)

        async def ask(job: JobId) -> None:
            try:
                await operation(launcher, job)
            except LauncherSilent as silent:
                refused.append(silent.data.get("sent"))
            except LauncherGone:  # too late
                return
            ended.append(job)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(launcher.serve)
            nursery.start_soon(launcher.watch_silence)
            async with trio.open_nursery() as asking:
                for job in range(1, many + 1):
                    asking.start_soon(ask, JobId(job))
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert len(ended) < many
                launcher.give_up()
                await trio.testing.wait_all_tasks_blocked(0.01)
                far.close()
            with pytest.raises((LauncherSilent, LauncherGone)):
                await operation(launcher, JobId(1))
            nursery.cancel_scope.cancel()
    assert len(ended) == many
    assert refused.count(False) > many // 2


async def test_questions_that_wait_for_room_in_the_socket_are_refused_by_a_silent_launcher(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_silent() as (launcher, far):
        answer_all(far)
        with trio.fail_after(60):
            while launcher.silent:  # noqa: ASYNC110
                await trio.sleep(0.1)
        refused: list[LauncherSilent] = []
        many = 2000

        async def ask() -> None:
            with pytest.raises(LauncherSilent) as caught:
                await launcher.promised_bytes()
            refused.append(caught.value)

        async with trio.open_nursery() as asking:
            for _ in range(many):
                asking.start_soon(ask)
            await trio.sleep(60)
            in_time = len(refused)
            launcher.give_up()
        assert in_time == many


@pytest.mark.parametrize("keeps_asks", [False, True])
async def test_launcher_of_before_is_not_told_what_it_cannot_keep(
    autojump_clock: trio.testing.MockClock, keeps_asks: bool
) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with trio.socket.from_stdlib_socket(near) as sock, far:
        launcher = LauncherClient(sock, keeps_asks=keeps_asks)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(launcher.serve)
            nursery.start_soon(launcher.kill, JobId(3), EndRequest("stop", 7))
            await trio.testing.wait_all_tasks_blocked(0.01)
            received = channel.receive(far)
            assert received is not None
            channel.send(far, {"id": 1, "ok": {}})
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
    told = {"cause": "stop", "kill_in_ms": 7} if keeps_asks else {}
    assert received[0] == {"id": 1, "op": "kill", "job": 3, **told}


async def test_launcher_that_does_not_end_and_may_not_be_killed_is_left(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """As a service that is root no more finds a guard that is stopped."""
    del autojump_clock
    has_ended = threading.Event()

    class Guard:
        pid, returncode = 4711, None

        def wait(self) -> None:
            has_ended.wait()

        def kill(self) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    try:
        await launcher_client._reap(cast("subprocess.Popen[bytes]", Guard()))
    finally:
        has_ended.set()
    assert "process 4711" in caplog.text
