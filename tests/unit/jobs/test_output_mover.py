"""The mover: what becomes of a job's output, and of the job, where no more of it can be kept."""

import os
from pathlib import Path

import pytest
import trio

from jobworker.errors import OutputError
from jobworker.jobs.budget import OutputBudget
from jobworker.jobs.output_mover import OutputMover, OutputRoom
from jobworker.jobs.output_pace import OutputPace
from jobworker.jobs.spool import Spool
from jobworker.model.job import OutputCut, Stream


@pytest.mark.parametrize("fault", [OutputError("cannot look"), OSError(5, "I/O"), ValueError("?")])
async def test_fault_of_those_who_make_room_cuts_output_and_is_no_end(
    tmp_path: Path, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def make_room() -> bool:
        raise fault

    told: list[OutputCut] = []
    spool = Spool.create(tmp_path / "job")
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    mover = OutputMover(
        spool=spool,
        max_bytes=None,
        room=OutputRoom(
            budget=OutputBudget(tmp_path, max_bytes=1000), pace=OutputPace(), make_room=make_room
        ),
        tell_cut=lambda cut, _: told.append(cut),
        cut=None,
    )
    with trio.fail_after(20):
        async with mover.moving({Stream.STDOUT: read_end}):
            os.write(write_end, b"x" * 3000)
            os.close(write_end)
    sizes = spool.statistics()
    spool.close()
    assert (sizes.stdout_bytes, sizes.discarded_bytes, told) == (1000, 2000, [OutputCut.TOTAL])
    assert str(fault) in caplog.text
