"""Work in a mount namespace of its own."""

import json
import os
import traceback
from collections.abc import Callable

import pytest

from jobworker.sandbox.root.stage import unshare_mounts

Work = Callable[[], object]


@pytest.fixture
def apart() -> Callable[[Work], object]:
    """Runs a function in a process with a mount namespace of its own, and returns its result."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a mount namespace")
    return _run


def _run(work: Work) -> object:
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            unshare_mounts()
            outcome = {"result": work()}
        except BaseException:  # noqa: BLE001 - told to the test
            outcome = {"fault": traceback.format_exc()}
        os.write(tell, json.dumps(outcome).encode())
        os._exit(0)
    os.close(tell)
    with open(told, "rb") as pipe:
        outcome = json.loads(pipe.read())
    os.waitpid(child, 0)
    assert "fault" not in outcome, outcome["fault"]
    return outcome["result"]
