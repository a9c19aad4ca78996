"""Each scope is removed once, however long the fork server takes for a call."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobworker.sandbox.event_loop import EventLoop
from jobworker.sandbox.fork_server import Answer
from jobworker.sandbox.forks import ForkServer
from jobworker.sandbox.launcher import scopes as scopes_module
from jobworker.sandbox.launcher.scopes import Scopes

NAMES = [f"job-{number}" for number in range(6)]
REFUSED_SECONDS = 0.02
"""The time that each call takes: longer than the first pauses between two tries."""


class Groups:
    """Stands for the kernel's groups, in the fork server: a file is a group with processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def remove(self, name: str) -> Answer:
        """Refuse it while it is busy, after a wait for a lock of the kernel."""
        time.sleep(REFUSED_SECONDS)
        with open(self._directory / "calls", "a") as calls:
            calls.write(f"{name}\n")
        if (self._directory / name).exists():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return {}, []


@pytest.fixture
def slow(event_loop: EventLoop, tmp_path: Path) -> Iterator[ForkServer]:
    """A fork server that waits in each call."""
    made = ForkServer(event_loop, {"remove": Groups(tmp_path).remove})
    yield made
    made.close()


def test_scope_that_stays_busy_has_one_call_at_a_time(
    event_loop: EventLoop, slow: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scopes_module, "AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(scopes_module, "SELDOM_SECONDS", 0.001)
    scopes, removed = Scopes(event_loop, slow), list[str]()
    for name in NAMES:
        (tmp_path / name).touch()
        scopes.remove(name, lambda name=name: removed.append(name))  # type: ignore[misc]
    calls = tmp_path / "calls"
    while not calls.exists() or calls.read_text().count(NAMES[-1]) < 3:
        event_loop.run_once()
    for name in NAMES:
        (tmp_path / name).unlink()
    while not (scopes.is_idle and slow.is_idle):
        event_loop.run_once()
    assert sorted(removed) == NAMES
    assert event_loop.take_times().incidents == 0, "each answer had its removal"
    made = [calls.read_text().split().count(name) for name in NAMES]
    assert max(made) - min(made) <= 1, "no scope is asked for while it waits for its answer"
