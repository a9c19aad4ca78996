"""The sizes of a job's output at one moment, and the job's record with them."""

from attrs import evolve, frozen

from jobworker.model.job import JobRecord


@frozen(kw_only=True)
class SpoolStatistics:
    """The state of a spool at one moment."""

    stdout_bytes: int
    stderr_bytes: int
    discarded_bytes: int
    records: int
    sealed: bool
    followers: int
    idle_followers: int

    @property
    def truncated(self) -> bool:
        """Whether some output was discarded."""
        return self.discarded_bytes > 0


def as_of_now(record: JobRecord, sizes: SpoolStatistics) -> JobRecord:
    """The record of a job with its output's present sizes; of an ended job, `record` itself."""
    return record if record.ended else with_sizes(record, sizes)


def with_sizes(record: JobRecord, sizes: SpoolStatistics) -> JobRecord:
    """The record of a job with these sizes of its output, and its discarded bytes."""
    return evolve(
        record,
        stdout_bytes=sizes.stdout_bytes,
        stderr_bytes=sizes.stderr_bytes,
        discarded_bytes=sizes.discarded_bytes,
    )
