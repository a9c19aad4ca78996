"""A launcher that is there and answers nothing, or speaks another version."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from jobworker.errors import HostUnsupported
from jobworker.sandbox import channel
from jobworker.sandbox.protocol import version
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service import launch
from jobworker.sandbox.service.launch import start_launcher

from ..services import open_embedded
from .conftest import child_of, until
from .test_launcher import Service, make_policy  # noqa: F401 - a fixture
from .wire import Refused, open_wire


async def test_launcher_that_is_stopped_is_told_and_goes_on(
    open_directory: Callable[[], Path],
) -> None:
    async with open_embedded(open_directory()) as service, open_wire(service) as wire:
        before = (await wire.call("job.run", job={"command": ["true"]}))["job"]
        assert isinstance(before, dict)
        launcher = child_of(child_of(service.process.pid))
        refusals: list[str] = []

        async def refused(method: str, **params: object) -> None:
            with pytest.raises(Refused, match="the launcher does not answer") as caught:
                await wire.call(method, **params)
            refusals.append(str(caught.value))

        command = ["sh", "-c", "echo once"]
        os.kill(launcher, signal.SIGSTOP)
        try:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lambda: refused("job.run", job={"command": command}))
                    nursery.start_soon(refused, "volume.list")
                await refused("job.run", job={"command": ["true"]})
            job = before["id"] + 1
            assert any(f"job {job}" in words for words in refusals), refusals
            assert (await wire.call("job.status", id=job))["state"] == "INITIALIZING"
            await until(lambda: "the launcher has not answered" in service.log_text())
        finally:
            os.kill(launcher, signal.SIGCONT)
        with trio.fail_after(30):
            ended = await wire.call("job.wait", id=job)
        assert (ended["state"], ended["exit_code"], ended["stdout_bytes"]) == ("COMPLETED", 0, 5)
        await until(lambda: "the launcher answers again" in service.log_text())
        after = (await wire.call("job.run", job={"command": ["true"]}))["job"]
        assert isinstance(after, dict)
        assert after["id"] == job + 1, "what was refused at once took no number"


def test_launcher_of_another_version_is_refused_by_both_versions(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "PROTOCOL", version.PROTOCOL + 1)
    words = f"version {version.PROTOCOL} .* service version {version.PROTOCOL + 1}"
    with pytest.raises(HostUnsupported, match=words) as caught:
        start_launcher(make_policy())
    assert "start both anew" in caught.value.remedy


def test_service_of_another_version_is_refused_by_both_versions(
    make_policy: Callable[..., LauncherPolicy],  # noqa: F811
) -> None:
    policy = make_policy()
    service = Service(start_launcher(policy), policy)
    try:
        reply, _ = service.ask("hello", 1, protocol=1)
        assert reply["error"] == {
            "step": "hello",
            "errno": 71,
            "detail": version.mismatch(version.PROTOCOL, 1),
        }
        channel.send(service.sock, {"id": 1, "op": "usage", "job": 1, "of": "memory"})
        assert channel.receive(service.sock) is None, "it leaves"
    finally:
        service.sock.close()
        assert service.leaves() == 0


@pytest.mark.parametrize("told", [None, 1, "2"])
def test_versions_that_differ_are_told(told: object) -> None:
    assert version.mismatch(version.PROTOCOL, version.PROTOCOL) == ""
    assert "of their protocol" in version.mismatch(version.PROTOCOL, told)
