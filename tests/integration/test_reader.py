"""The process that reads the configuration again, and what is done each day with what it read."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobworker.cli.worker import embedded_service
from jobworker.server.startup import configuration_reader

from ..services import open_embedded
from .conftest import until
from .wire import open_wire

DAILY = """
from jobworker import incidents
from jobworker.errors import ConfigError
from jobworker.server.startup import reload
incidents.FIRST_PAUSE_SECONDS = reload.DAY_SECONDS = 0.01
faults = [OSError(24, "first fault"), ValueError("second fault"), ConfigError("not good today")]
def warnings(files, now):
    if faults:
        raise faults.pop(0)
    return ["the next day's warning"]
reload.expiry_warnings = warnings
from jobworker.cli.worker.main import main; main()
"""
"""A service whose days are short, and whose look at its certificates fails at first."""


async def test_end_of_the_reader_is_told_at_once_and_ends_nothing(
    open_directory: Callable[[], Path],
) -> None:
    async with open_embedded(open_directory()) as service, open_wire(service) as wire:
        pid = service.process.pid
        (reading,) = [
            int(child)
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if Path(f"/proc/{child}/comm").read_text().strip() == configuration_reader.NAME
        ]
        assert configuration_reader.NAME not in service.log_text()
        os.kill(reading, signal.SIGKILL)
        await until(lambda: f"again ({configuration_reader.NAME}) has ended" in service.log_text())
        out, _, _ = await wire.run("echo", "on")
        assert out == "on\n"
        service.process.send_signal(signal.SIGHUP)
        await until(lambda: "cannot reload" in service.log_text())
        out, _, _ = await wire.run("echo", "on")
        assert out == "on\n"


async def test_daily_warning_that_fails_is_told_and_comes_again(
    open_directory: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_service, "program", lambda _: [sys.executable, "-c", DAILY])
    async with open_embedded(open_directory()) as service, open_wire(service) as wire:
        await until(lambda: "the next day's warning" in service.log_text())
        text = service.log_text()
        for words in ("OSError: [Errno 24] first fault", "ValueError: second fault"):
            assert words in text
        assert "not good today" in text
        assert len(set(re.findall(r"incident (\w+): expiry", text))) == 2
        out, _, _ = await wire.run("echo", "on")
        assert out == "on\n"
