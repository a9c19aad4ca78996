"""What holds for all tests."""

import os
import shutil
import signal

import pytest


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
