"""Which lost writes of volumes are told at a job's end, and when."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from jobworker.sandbox.channel import Message
from jobworker.sandbox.chores import Chores
from jobworker.sandbox.disk import images
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import volume_losses
from jobworker.sandbox.launcher.child import Child
from jobworker.sandbox.launcher.children import ChildPool
from jobworker.sandbox.launcher.volume_losses import MAX_INSPECTIONS, VolumeLosses

from .conftest import StartChild


class Ends:
    """The search for lost writes, and what it has told and released, in this order."""

    def __init__(self, event_loop: EventLoop, forks: ForkServer | None) -> None:
        self.event_loop = event_loop
        self.done = list[str]()
        pool = SimpleNamespace(
            event_loop=event_loop,
            forks=forks,
            slots=2,
            release_volumes=lambda _: self.done.append("released"),
        )
        self.losses = VolumeLosses(cast("ChildPool", pool), lambda _: self.done.append("told"))

    def find(self, child: Child) -> None:
        self.losses.find(child)
        while "told" not in self.done:
            self.event_loop.run_once()


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[int]:
    """The root directory of something like a volume, opened."""
    opened = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield opened
    os.close(opened)


def loses_one(root: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{root}/bad")


def is_killed(_: int) -> bool:
    os.kill(os.getpid(), signal.SIGKILL)
    return True


@pytest.fixture
def ends(request: pytest.FixtureRequest, event_loop: EventLoop) -> Iterator[Ends]:
    """With a fork server, whose look at a volume is the parameter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "volume_lost_writes", getattr(request, "param", loses_one))
        forks = ForkServer(event_loop, {})
        yield Ends(event_loop, forks)
        forks.close()


def test_end_of_a_job_without_volumes_is_told_at_once(
    event_loop: EventLoop, start_child: StartChild
) -> None:
    ends = Ends(event_loop, None)
    ends.losses.find(start_child())
    assert ends.done == ["told"]


def test_volumes_are_released_before_their_losses_are_told(
    ends: Ends, start_child: StartChild, volume: int, tmp_path: Path
) -> None:
    (tmp_path / "bad").mkdir()
    bad = os.open(tmp_path / "bad", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    child = start_child()
    child.volume_roots = {"one": volume, "two": bad}
    ends.find(child)
    os.close(bad)
    assert (child.lost, child.unseen) == (["one"], [])
    assert ends.done == ["released", "told"]
    assert not child.inspected


@pytest.mark.parametrize("ends", [images.volume_lost_writes], indirect=True, ids=["real"])
def test_volume_that_the_kernel_wrote_out_has_lost_nothing(
    ends: Ends, start_child: StartChild, volume: int
) -> None:
    child = start_child()
    child.volume_roots = {"one": volume}
    ends.find(child)
    assert (child.lost, child.unseen, child.inspections) == ([], [], 1)


@pytest.mark.parametrize("ends", [is_killed], indirect=True, ids=["killed"])
def test_volumes_whose_processes_are_all_killed_are_told_as_unseen(
    ends: Ends, start_child: StartChild, volume: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_losses, "INSPECT_AGAIN_SECONDS", 0)
    monkeypatch.setattr(volume_losses, "MAX_INSPECTIONS", 3)
    lines = list[str]()
    monkeypatch.setattr(volume_losses, "log_line", lines.append)
    child = start_child()
    child.job, child.volume_roots = 4, {"one": volume}
    ends.find(child)
    assert (child.lost, child.unseen, child.inspections) == ([], ["one"], 3)
    assert ends.done == ["released", "told"]
    assert len(lines) == 1
    assert lines[0].startswith("job 4: cannot look at its volumes, and gives up")
    assert MAX_INSPECTIONS > 3


class NoProcess:
    """Chores for which no process can be made."""

    def __init__(self) -> None:
        self.dones: list[Callable[[Message], None]] = []
        self.refuses = True

    def start(self, _work: object, done: Callable[[Message], None], _roots: object) -> None:
        if self.refuses:
            raise OSError(24, "no descriptor is left")
        self.dones.append(done)


@pytest.fixture
def lacking(event_loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> tuple[Ends, NoProcess]:
    """Where no process can be made, and what plays the processes."""
    monkeypatch.setattr(volume_losses, "INSPECT_AGAIN_SECONDS", 0)
    ends, processes = Ends(event_loop, None), NoProcess()
    ends.losses._inspectors = cast("Chores", processes)
    return ends, processes


@pytest.mark.parametrize("begins", [False, True], ids=["refused", "not begun"])
def test_process_that_cannot_be_made_is_made_later_and_logged_once(
    lacking: tuple[Ends, NoProcess],
    start_child: StartChild,
    begins: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends, processes = lacking
    lines = list[str]()
    monkeypatch.setattr(volume_losses, "log_line", lines.append)
    child = start_child()
    child.job, child.volume_roots = 4, {"one": 99}
    processes.refuses = not begins
    ends.losses.find(child)
    for _ in range(3):
        if begins:
            processes.dones.pop()({"errno": 11, "detail": "", "begun": False})
        ends.event_loop.run_once()
    assert len(lines) == 1
    assert not ends.done
    assert child.inspections == 0, "no process has looked"
    processes.refuses = False
    while not processes.dones:
        ends.event_loop.run_once()
    processes.dones.pop()({"lost": ["one"]})
    assert ends.done == ["released", "told"]
    assert child.lost == ["one"]


def test_job_that_was_removed_meanwhile_is_not_looked_at_again(
    lacking: tuple[Ends, NoProcess], start_child: StartChild
) -> None:
    ends, _ = lacking
    child = start_child()
    child.volume_roots = {"one": 99}
    ends.losses.find(child)
    assert ends.done == ["released", "told"]
    assert not child.inspected
