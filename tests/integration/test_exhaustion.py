"""A service that runs out of disk: it stays up, says so, and goes on after."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from jobworker.sandbox import syscalls as sc

from ..services import open_embedded
from .conftest import left_behind, until
from .wire import Refused, open_wire


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    """A file system of its own at `path`, in memory."""
    path.mkdir(parents=True)
    sc.mount("tmpfs", str(path), "tmpfs", 0, f"size={size},mode=700")
    try:
        yield
    finally:
        sc.umount(str(path))


def fill(path: Path) -> None:
    """Take all the room that there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


async def test_full_disk_under_history_and_output_is_told_and_survived(
    open_directory: Callable[[], Path],
) -> None:
    directory = open_directory()
    state = directory / "state"
    state.mkdir()
    with small_disk(state / "service", "24m"):
        extra = {"worker": {"keep_free": 0}}
        async with open_embedded(directory, extra) as service, open_wire(service) as wire:
            job = await wire.start("sleep", "600")
            with trio.fail_after(20):
                while (await wire.call("job.status", id=job))["state"] != "RUNNING":  # noqa: ASYNC110
                    await trio.sleep(0.01)
            fill(state / "service" / "filler")
            with pytest.raises(Refused, match=r"cannot (record job|create the job's output)"):
                await wire.start("true")
            ended = await wire.call("job.stop", id=job)
            assert ended["state"] == "STOPPED", "who asks is told, though it cannot be recorded"
            assert (await wire.call("job.status", id=job))["state"] == "STOPPED"
            (state / "service" / "filler").unlink()
            await until(lambda: f"job {job}: STOPPED" in service.log_text())
            out, _, _ = await wire.run("echo", "again")
            assert out == "again\n"
            service.process.kill()
            await service.process.wait()
        async with open_embedded(directory, extra) as service, open_wire(service) as wire:
            assert (await wire.call("job.status", id=job))["state"] == "STOPPED", "it is recorded"
    assert left_behind(directory) == []
