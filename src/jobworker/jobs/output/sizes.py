"""A job's record with the sizes of its output at this moment."""

from attrs import evolve

from jobworker.jobs.output.spool import Spool
from jobworker.model.job import JobRecord


def as_of_now(record: JobRecord, spool: Spool) -> JobRecord:
    """The record of a job with its output's present sizes; of an ended job, `record` itself."""
    return record if record.ended else with_sizes(record, spool)


def with_sizes(record: JobRecord, spool: Spool) -> JobRecord:
    """The record of a job with the sizes of `spool` at this moment, and its discarded bytes."""
    sizes = spool.statistics()
    return evolve(
        record,
        stdout_bytes=sizes.stdout_bytes,
        stderr_bytes=sizes.stderr_bytes,
        discarded_bytes=sizes.discarded_bytes,
    )
