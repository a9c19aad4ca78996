"""No two services of a host give their jobs the same user ids, whatever has become of either."""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import trio
from attrs import evolve

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.config.settings import SandboxSettings, Settings, WorkerSettings
from jobworker.errors import ConfigError
from jobworker.sandbox import channel
from jobworker.sandbox.protocol.policy import LauncherPolicy
from jobworker.sandbox.service.launch import start_launcher
from jobworker.sandbox.user_namespaces import IDS_PER_JOB
from jobworker.server.host.id_ranges import LOCK_FILE, IdRange, lock_ids, lock_own_id, own_id

from ..services import open_embedded, write_configuration
from .conftest import child_of, until
from .outside import open_launcher, settings_with
from .test_launcher import Service, make_policy
from .test_startup import fails_with, serve, site
from .wire import open_wire

pytestmark = pytest.mark.alone

__all__ = ["make_policy", "site"]

FEW = Settings(
    worker=WorkerSettings(max_concurrent_jobs=3), sandbox=SandboxSettings(first_uid=0, spares=1)
)


def with_first(first_uid: int, jobs: int = 3) -> Settings:
    return evolve(
        FEW,
        worker=evolve(FEW.worker, max_concurrent_jobs=jobs),
        sandbox=evolve(FEW.sandbox, first_uid=first_uid),
    )


def extra(first_uid: int) -> dict[str, dict[str, object]]:
    return {"sandbox": {"first_uid": first_uid}, "worker": {"max_concurrent_jobs": 3}}


@pytest.fixture
def free() -> int:
    """The first of some ids that no other run of these tests has, with room on either side."""
    return (53_000 + os.getpid() % 400 * 24) * IDS_PER_JOB


async def test_second_service_with_ids_of_another_is_refused(
    site: Path, open_directory: Callable[[], Path], free: int
) -> None:
    async with open_embedded(open_directory(), extra(free)):
        for first in (free, free - 4 * IDS_PER_JOB + 1, free + 3 * IDS_PER_JOB, free + 65_537):
            done = serve(write_configuration(site, extra(first)))
            fails_with(done, 78, "ids", "another service", str(free), "sandbox.first_uid")
        async with open_embedded(site, extra(free - 6 * IDS_PER_JOB)) as beside:
            assert beside.process.returncode is None
    async with open_embedded(site, extra(free)):
        pass  # what has ended holds nothing


async def test_launcher_that_outlives_its_service_keeps_its_ids(
    site: Path, open_directory: Callable[[], Path], free: int
) -> None:
    directory = open_directory()
    with open_launcher(directory, extra(free)):
        async with open_embedded(directory, settings_with(directory, extra(free))) as first:
            async with open_wire(first) as wire:
                await wire.start("sleep", "1000")
            first.process.kill()
            await first.process.wait()
        fails_with(serve(write_configuration(site, extra(free))), 78, "another service")
        done = launch(site, extra(free))
        fails_with(done, 78, "another service", "sandbox.first_uid")
    async with open_embedded(site, extra(free)):
        pass


def launch(
    directory: Path, extra: dict[str, dict[str, object]]
) -> "subprocess.CompletedProcess[str]":
    config = write_configuration(directory, {**extra})
    return subprocess.run(
        [*program("worker"), "launcher", f"--config={config}", f"--socket={directory}/launcher"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_ids_of_a_launcher_that_was_killed_are_free_at_once(
    open_directory: Callable[[], Path], free: int
) -> None:
    directory = open_directory()
    async with open_embedded(directory, extra(free)) as service:
        async with open_wire(service) as wire:
            await wire.start("sleep", "1000")
        os.kill(child_of(child_of(service.process.pid)), signal.SIGKILL)
        await service.process.wait()
    async with open_embedded(directory, extra(free)) as service:
        assert service.process.returncode is None


def test_launcher_without_a_lock_is_seen_by_its_jobs(
    make_policy: Callable[..., LauncherPolicy], monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Such as one of an earlier version: its spares have the ids."""
    monkeypatch.setattr("jobworker.server.host.id_ranges.LEAVING_SECONDS", 0.2)
    policy = make_policy()._replace(first_uid=free)
    service = Service(start_launcher(policy), policy)
    try:
        service.spawn(1, "sleep", "1000")
        with pytest.raises(ConfigError, match=r"process \d+ has"):
            os.close(lock_ids(with_first(free - IDS_PER_JOB)).descriptor)
        taken = range(free, free + 5 * IDS_PER_JOB)
        for _ in range(3):
            ids = lock_ids(with_first(0))
            os.close(ids.descriptor)
            assert ids.first not in taken
    finally:
        service.sock.close()
        service.process.wait()


# --- the service's own id -----------------------------------------------------------------------


def user_of(service: EmbeddedService) -> int:
    return os.stat(f"/proc/{service.process.pid}").st_uid


async def until_told(service: EmbeddedService, words: str) -> None:
    await until(lambda: words in service.log_text())


async def test_own_id_is_that_of_nobody_else(
    open_directory: Callable[[], Path],
) -> None:
    """Another service's jobs, its own jobs or a process take it; then it is free again."""
    directory = open_directory()
    own = own_id(directory / "state")
    first = own - 70_000
    theirs, ours = (IdRange(first, first + jobs * IDS_PER_JOB - 1) for jobs in (3 + 1, 3 + 2))
    cases: tuple[
        tuple[AbstractContextManager[None], IdRange, dict[str, dict[str, object]]], ...
    ] = (
        (jobs_of_others(first), theirs, {}),
        (nullcontext(), ours, extra(first)),
        (process_of(own), IdRange(own, own), {}),
    )
    for taken, ids, numbers in cases:
        with taken:
            async with open_embedded(directory, numbers) as service, open_wire(service) as wire:
                assert user_of(service) not in ids
                why = f"its own id, {own}, is a user's"
                await until_told(service, f"runs as user {user_of(service)}: {why}")
                assert (await wire.run("echo", "here"))[0] == "here\n"
    async with open_embedded(directory) as service:
        assert user_of(service) == own


@contextmanager
def jobs_of_others(first: int) -> Iterator[None]:
    ids = lock_ids(with_first(first))
    try:
        yield
    finally:
        os.close(ids.descriptor)


@contextmanager
def process_of(uid: int) -> Iterator[None]:
    with subprocess.Popen(["sleep", "1000"], user=uid) as process:
        try:
            yield
        finally:
            process.kill()


async def test_copied_state_directory_makes_nobody_elses_user_the_service(
    open_directory: Callable[[], Path],
) -> None:
    """Whomever its files belong to: the first service, root, or a user of the host."""
    directory, copy = open_directory(), open_directory()
    async with open_embedded(directory) as service, open_wire(service) as wire:
        assert (await wire.run("echo", "here"))[0] == "here\n"
    for owner in (own_id(directory / "state"), 0, pwd.getpwnam("daemon").pw_uid):
        shutil.rmtree(copy / "state", ignore_errors=True)
        await trio.run_process(["cp", "-a", directory / "state", copy / "state"])
        await trio.run_process(["chown", "-R", f"{owner}:{owner}", copy / "state/service"])
        async with open_embedded(copy) as service, open_wire(service) as wire:
            assert user_of(service) == own_id(copy / "state") != own_id(directory / "state")
            result = await wire.call("job.log", id=1)
            assert (await wire.output(result["subscription"]))[0] == b"here\n"
            status = (copy / "state/service/history.db").stat()
            assert (status.st_uid, status.st_gid) == (user_of(service), user_of(service))


def test_own_ids_are_for_one_service_each(tmp_path: Path, free: int) -> None:
    """Even where two come to the same number, or jobs of a launcher without a lock have it."""
    own, jobs = own_id(tmp_path), IdRange(free, free + IDS_PER_JOB - 1)
    several = [lock_own_id(tmp_path, jobs) for _ in range(3)]
    channel.close_all([ids.descriptor for ids in several])
    assert several[0].first == own
    assert len({ids.first for ids in several}) == 3
    around = IdRange(own - 1, own + IDS_PER_JOB - 2)
    ids = lock_own_id(tmp_path, around)
    os.close(ids.descriptor)
    assert ids.first not in around


def test_free_ranges_are_free_for_one_each() -> None:
    several = [lock_ids(FEW) for _ in range(50)]
    many = lock_ids(with_first(0, 4000))  # the area that others use has no such room left
    try:
        firsts = sorted(ids.first for ids in several)
        gaps = [after - before for before, after in itertools.pairwise(firsts)]
        assert min(gaps) >= 4 * IDS_PER_JOB + 5
        assert many.first not in firsts
    finally:
        channel.close_all([ids.descriptor for ids in (*several, many)])


def test_unprivileged_users_cannot_touch_the_lock() -> None:
    os.close(lock_ids(FEW).descriptor)
    status = LOCK_FILE.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o600)
    assert LOCK_FILE.parent.stat().st_mode & 0o022 == 0
