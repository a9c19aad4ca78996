"""Marks of jobs that are being removed: the last caller takes the mark away."""

import pytest

from jobworker.jobs.removals import Removals
from jobworker.model.job import JobId


def test_mark_stays_until_the_last_caller_is_done() -> None:
    removals = Removals()
    with removals.marked(JobId(1)):
        with pytest.raises(KeyError), removals.marked(JobId(1)):
            raise KeyError("gives up")
        assert JobId(1) in removals
        assert JobId(2) not in removals
    assert JobId(1) not in removals
