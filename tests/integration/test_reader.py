"""The process that reads the configuration again, when something ends it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from jobworker.cli.embedded import open_embedded
from jobworker.server import reader

from .conftest import until
from .wire import open_wire


async def test_end_of_the_reader_is_told_at_once_and_ends_nothing(
    open_directory: Callable[[], Path],
) -> None:
    async with open_embedded(open_directory()) as service, open_wire(service) as wire:
        pid = service.process.pid
        (reading,) = [
            int(child)
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if Path(f"/proc/{child}/comm").read_text().strip() == reader.NAME
        ]
        assert reader.NAME not in service.log_text()
        os.kill(reading, signal.SIGKILL)
        await until(lambda: f"again ({reader.NAME}) has ended" in service.log_text())
        out, _, _ = await wire.run("echo", "on")
        assert out == "on\n"
        service.process.send_signal(signal.SIGHUP)
        await until(lambda: "cannot reload" in service.log_text())
        out, _, _ = await wire.run("echo", "on")
        assert out == "on\n"
