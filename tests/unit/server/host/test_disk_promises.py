"""Disk promises: whether the host has room for all that jobs' disks may take."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from attrs import define, evolve, field

from jobworker.config.settings import Settings
from jobworker.errors import ConfigError, LauncherSilent
from jobworker.jobs.output.budget import OutputBudget
from jobworker.model.units import MEBIBYTE
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.server.host import disk_promises
from jobworker.server.host.disk_promises import (
    LOOK_SECONDS,
    DiskPromises,
    check_promises,
    disks_bytes,
    free_bytes,
    promise_warnings,
    promised_bytes,
)

PROMISED = (3 * 64 + 100) * MEBIBYTE


def settings(*, overcommit: bool = False) -> Settings:
    """Three disks of 64 MiB, and 100 MiB that stay free."""
    plain = Settings()
    return evolve(
        plain,
        worker=evolve(plain.worker, max_concurrent_jobs=3, keep_free=100),
        sandbox=evolve(plain.sandbox, disk_limit=64, overcommit_disk=overcommit),
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that are free, to be changed."""
    free = [PROMISED]
    monkeypatch.setattr(disk_promises, "free_bytes", lambda _: free[0])
    return free


def test_disks_are_promised_and_what_must_stay_free() -> None:
    assert disks_bytes(settings()) == 3 * 64 * MEBIBYTE
    assert promised_bytes(settings()) == PROMISED


def test_free_bytes_are_those_of_an_unprivileged_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status = SimpleNamespace(f_bavail=5, f_bfree=9, f_frsize=1024, f_bsize=4096)
    monkeypatch.setattr(os, "statvfs", {tmp_path: status}.__getitem__)
    assert free_bytes(tmp_path) == 5 * 1024


def test_host_that_has_just_what_it_promises_is_told_both(free: list[int], tmp_path: Path) -> None:
    assert check_promises(settings(), tmp_path) == "292.0 MiB at most, 292.0 MiB free"
    assert promise_warnings(settings(), tmp_path) == ()


@pytest.mark.parametrize(
    ("overcommit", "words", "remedy"),
    [
        (True, "cannot cover what jobs may write", "sandbox.overcommit_disk to false"),
        (False, "cannot reserve the disks of all jobs", "lower sandbox.disk_limit"),
    ],
)
def test_one_byte_less_is_a_fault_of_the_configuration(
    free: list[int], tmp_path: Path, words: str, remedy: str, *, overcommit: bool
) -> None:
    free[0] -= 1
    with pytest.raises(ConfigError, match=words) as refused:
        check_promises(settings(overcommit=overcommit), tmp_path)
    assert "the disks of 3 jobs may take 64.0 MiB each" in refused.value.message
    assert remedy in refused.value.remedy
    assert ("overcommit" in refused.value.remedy) is overcommit
    assert promise_warnings(settings(overcommit=overcommit), tmp_path) == (str(refused.value),)


# --- while the service runs -----------------------------------------------------------------


@define(eq=False)
class PlayedLauncher:
    """Promises what a test says."""

    promised: int = 0
    fault: Exception | None = None
    asked: list[float] = field(factory=list)

    async def promised_bytes(self) -> int:
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        if self.fault is not None:
            raise self.fault
        return self.promised


@define(eq=False)
class PlayedBudget:
    """What it was told to leave room for."""

    promises: list[int] = field(factory=list)

    def promise(self, count: int) -> None:
        self.promises.append(count)


def following(
    launcher: PlayedLauncher, directory: Path, budget: PlayedBudget | None = None, most: int = 0
) -> DiskPromises:
    return DiskPromises(
        launcher=cast(LauncherClient, launcher),
        directory=directory,
        budget=cast(OutputBudget | None, budget),
        most=most,
    )


def test_shortfall_is_told_and_taken_back(free: list[int], tmp_path: Path) -> None:
    promises = following(PlayedLauncher(), tmp_path)
    promises._look(PROMISED)
    assert promises.shortfall == ""
    promises._look(PROMISED + MEBIBYTE)
    assert "has 292.0 MiB free for 293.0 MiB" in promises.shortfall
    free[0] += MEBIBYTE
    promises._look(PROMISED + MEBIBYTE)
    assert promises.shortfall == ""


def test_output_leaves_room_for_what_the_settings_have(free: list[int], tmp_path: Path) -> None:
    budget = PlayedBudget()
    promises = following(PlayedLauncher(), tmp_path, budget, most=100)
    for promised in (99, 100, 101):
        promises._look(promised)
    assert budget.promises == [99, 100, 100]
    following(PlayedLauncher(), tmp_path)._look(1)


def test_disk_that_cannot_be_read_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: Path) -> int:
        raise OSError(5, "Input/output error")

    promises, budget = following(PlayedLauncher(), tmp_path, PlayedBudget()), PlayedBudget()
    promises.shortfall, promises._budget = "as before", cast(OutputBudget, budget)
    monkeypatch.setattr(disk_promises, "free_bytes", fail)
    promises._look(5)
    assert promises.shortfall == "as before"
    assert budget.promises == [0], "the budget hears of it all the same"


async def test_launcher_is_asked_again_and_again_even_after_it_failed(
    free: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    async def at_once(function: object, *arguments: object) -> object:
        await trio.lowlevel.checkpoint()
        return function(*arguments)  # type: ignore[operator]

    monkeypatch.setattr(disk_promises, "in_thread", at_once)
    launcher = PlayedLauncher(fault=LauncherSilent("cannot tell"))
    promises = following(launcher, tmp_path)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(promises.follow)
        await trio.sleep(2.5 * LOOK_SECONDS)
        assert promises.shortfall == ""
        launcher.fault, launcher.promised = None, PROMISED + 1
        await trio.sleep(LOOK_SECONDS)
        assert promises.shortfall
        nursery.cancel_scope.cancel()
    assert [at - began for at in launcher.asked] == pytest.approx([0, 1, 2, 3])
