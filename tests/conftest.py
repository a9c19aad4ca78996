"""What holds for all tests."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

UNIT_TESTS = Path(__file__).parent / "unit"


def pytest_configure() -> None:
    """Have Ctrl-C mean something: whoever runs the tests in the background ignores it.

    An ignored signal stays ignored through execve(2), so that neither the service nor
    a client that a test starts could be interrupted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def compiler() -> str:
    """The C compiler that builds attacks and libraries; skips the test where there is none."""
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("needs gcc")
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is marked `soak` to `make soak`: it repeats at length what others show shortly."""
    if os.environ.get("JOBWORKER_SOAK"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in set(long)]


def attached_disks() -> set[str]:
    """The loop devices that have a file behind them."""
    return {path.parts[3] for path in Path("/sys/block").glob("loop*/loop/backing_file")}


@pytest.fixture(scope="session", autouse=True)
def _disks_go_with_their_jobs(request: pytest.FixtureRequest) -> Iterator[None]:
    """No disk of any service stays: their files have no names by which to tell whose they are.

    Unit tests start no service, and `make test` runs them beside those that do.
    """
    if all(item.path.is_relative_to(UNIT_TESTS) for item in request.session.items):
        yield
        return
    before = attached_disks()
    yield
    deadline = time.monotonic() + 20
    while attached_disks() - before and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel lets go of them on its own
    assert attached_disks() <= before
