"""What ended jobs had is let go of by processes, whatever fails around that."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobworker.sandbox import event_loop as turns_module
from jobworker.sandbox.disk import images as disk_images
from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import sweepers as sweepers_module
from jobworker.sandbox.launcher.sweepers import MAX_EACH, Sweepers


def test_all_is_let_go_of_however_much_there_is_at_a_time(
    event_loop: EventLoop, forks: ForkServer, tmp_path: Path
) -> None:
    sweepers, ends = Sweepers(event_loop, forks), []
    for number in range(3 * MAX_EACH):
        (tmp_path / str(number) / "below").mkdir(parents=True)
        read, write = os.pipe2(os.O_CLOEXEC)
        ends.append(read)
        sweepers.remove(str(tmp_path / str(number)))
        sweepers.close([write])
    while not sweepers.is_idle:
        event_loop.run_once()
    assert not list(tmp_path.iterdir())
    assert {os.read(read, 1) for read in ends} == {b""}, "nobody has the other ends"
    for read in ends:
        os.close(read)


def test_what_no_process_could_let_go_of_goes_later(
    event_loop: EventLoop, forks: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweepers_module, "AGAIN_SECONDS", 0)
    sweepers, refused = Sweepers(event_loop, forks), list[str]()
    call = forks.call

    def refuse(name: str, arguments: Sequence[object], done: object, *rest: object) -> None:
        refused.append(name)
        if len(refused) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if len(refused) == 2:
            event_loop.call_later(0, lambda: done({"errno": errno.EAGAIN, "detail": ""}, []))  # type: ignore[operator]
        else:
            call(name, arguments, done, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(forks, "call", refuse)
    sweepers.remove(str(tmp_path))
    while not sweepers.is_idle:
        event_loop.run_once()
    assert refused == ["run"] * 3
    assert not tmp_path.exists()


def test_what_follows_a_sweep_is_tried_again_where_it_fails(
    event_loop: EventLoop, forks: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "AGAIN_SECONDS", 0)
    sweepers, counted = Sweepers(event_loop, forks), list[bool]()

    def fail_once() -> int:
        counted.append(True)
        if len(counted) == 1:
            raise KeyError("unforeseen")
        return 0

    monkeypatch.setattr(sweepers, "count_kept", fail_once)
    sweepers.remove(str(tmp_path))
    while len(counted) < 2:
        event_loop.run_once()
    assert sweepers.is_idle


def test_disk_counts_as_kept_where_nothing_tells() -> None:
    nothing = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)  # flock(2) refuses it
    assert disk_images.is_attached(nothing)
    os.close(nothing)
