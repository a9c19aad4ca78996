"""A job that the history does not have: what is made of what stands in its place."""

from datetime import UTC, datetime
from pathlib import Path

from jobworker.jobs.adoption import adopted
from jobworker.model.job import JobId


def test_directory_that_cannot_be_looked_into_is_left_alone(tmp_path: Path) -> None:
    """A name that is too long stands for a disk that fails."""
    directory = tmp_path / (256 * "x")
    now = datetime.now(UTC)
    assert adopted(JobId(7), None, lives=False, directory=directory, now=now) is None
