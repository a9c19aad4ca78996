"""Output whose files are not as the service left them: what is there is shown, the rest told.

A power cut, a repair of the file system, a copy put back or a disk that is not mounted: real
services over real launchers, and in between another hand has been at the files.
"""

import base64
import os
from collections.abc import Callable
from pathlib import Path

from .outside import open_launcher
from .test_lost_state import service_in, spool, told
from .test_takeover import COUNTER, log_of, serving, start, until_bigger
from .wire import Json, Wire, open_wire

Directory = Callable[[], Path]


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def log_and_end(wire: Wire, job: int) -> tuple[bytes, Json]:
    """Standard output, and what `job.output_end` says."""
    result = await wire.call("job.log", id=job)
    out = b""
    async for message in wire.notes(result["subscription"]):
        params = message["params"]
        assert isinstance(params, dict)
        if message["method"] == "job.output_end":
            return out, params
        if params["stream"] == "stdout":
            out += base64.b64decode(params["data"])
    raise AssertionError("the subscription ended without a word")


async def test_ended_output_that_became_shorter_is_told_and_can_be_put_back(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    async with service_in(directory) as (_, wire):
        job = await start(wire, "seq 1 9; echo err >&2")
        await wire.call("job.wait", id=job)
        whole = tree(spool(directory, job))
        os.truncate(spool(directory, job) / "stdout", 4)
        cut = tree(spool(directory, job))
        out, end = await log_and_end(wire, job)
        assert out == b"1\n2\n"
        assert "14 of 18 bytes of stdout are missing" in str(end["error"])
        assert "output_failed" in str(end["error"])
    async with service_in(directory) as (service, wire):
        assert (await log_and_end(wire, job))[0] == b"1\n2\n"
        assert tree(spool(directory, job)) == cut, "nothing of it was changed"
        assert "14 of 18 bytes of stdout are missing" in service.log_text()
        (spool(directory, job) / "stdout").write_bytes(whole["stdout"])
        out, end = await log_and_end(wire, job)
        assert (out, end["error"]) == (whole["stdout"], None)
        assert (await told(wire, job))["stdout_bytes"] == 18


async def test_live_output_that_became_shorter_is_told_with_the_job(
    open_directory: Directory,
) -> None:
    directory = open_directory()
    with open_launcher(directory):
        async with serving(directory) as service, open_wire(service) as wire:
            job = await start(wire, COUNTER)
            await until_bigger(wire, job, 20)
            service.process.kill()
            await service.process.wait()
        stdout = spool(directory, job) / "stdout"
        lost = stdout.stat().st_size - 7
        os.truncate(stdout, 7)
        async with serving(directory) as service, open_wire(service) as wire:
            after = await told(wire, job)
            assert f"{lost} bytes of output from before " in str(after["detail"])
            assert after["discarded_bytes"] == lost
            await wire.call("job.stop", id=job)
            assert (await log_of(wire, job))[0].startswith(b"0\n1\n2\n3")
            assert (await told(wire, job))["discarded_bytes"] == lost
