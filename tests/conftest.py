"""What holds for all tests."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

UNIT_TESTS = Path(__file__).resolve().parent / "unit"


def pytest_configure() -> None:
    r"""Have Ctrl-C and Ctrl-\ mean something: who runs the tests in the background ignores them.

    An ignored signal stays ignored through execve(2), so that neither the service nor
    a client that a test starts could be interrupted.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


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


def _unit_tests_only(config: pytest.Config) -> bool:
    """By what was asked for: with pytest-xdist only its workers know the tests."""
    asked = (config.invocation_params.dir / each.partition("::")[0] for each in config.args)
    return all(path.resolve().is_relative_to(UNIT_TESTS) for path in asked)


BEFORE = pytest.StashKey[set[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember which disks there are."""
    session.config.stash[BEFORE] = attached_disks()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a disk of a service has stayed, once all workers of pytest-xdist have ended.

    Unit tests start no service, and `make test` runs them beside some that do.
    """
    if _unit_tests_only(session.config) or hasattr(session.config, "workerinput"):
        return
    deadline, before = time.monotonic() + 20, session.config.stash[BEFORE]
    while (left := attached_disks() - before) and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel lets go of them on its own
    if left:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        reporter.write_line(f"\ndisks that nobody has detached: {sorted(left)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
