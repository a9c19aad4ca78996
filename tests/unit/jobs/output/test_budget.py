"""The room that output leaves for what live jobs' disks may still take."""

from pathlib import Path

import pytest

from jobworker.errors import OutputError
from jobworker.jobs.output.budget import OutputBudget


def test_output_takes_none_of_the_disks_room_and_what_they_took_is_not_kept_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between two looks at the disks; so many bytes are free as the disk itself would say."""
    free = 100
    monkeypatch.setattr(OutputBudget, "_disk_bytes", lambda _: free)
    budget = OutputBudget(tmp_path, keep_free_bytes=16)
    budget.promise(48)
    assert budget.reserve(30) == 30
    free -= 30
    assert budget.reserve(30) == 100 - 30 - 48 - 16, "and not the disks' room"
    free -= 6
    with pytest.raises(OutputError):
        budget.reserve(1)
    free -= 40  # a disk has taken it, of what it might take
    with pytest.raises(OutputError):
        budget.reserve(1)
    budget.promise(8)  # the next look
    free += 20
    assert budget.reserve(30) == 20
