"""What a client's request becomes: the job's first record, and what the launcher is asked for."""

from collections.abc import Mapping
from datetime import datetime

from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox.start.plan import Order


def first_record(
    job: JobId, spec: JobSpec, owner: str, *, timeout_seconds: float, now: datetime
) -> JobRecord:
    """The record of a job that has just come; `timeout_seconds` is for one that names none."""
    if spec.timeout_seconds is not None:
        timeout_seconds = spec.timeout_seconds
    shown = spec.without_secrets(timeout_seconds=timeout_seconds)
    return JobRecord(id=job, spec=shown, owner=owner, created_at=now)


def order_of(spec: JobSpec, job: JobId, secret_environment: Mapping[str, str]) -> Order:
    """The order for a job; `spec` has every default filled in."""
    return Order(
        hostname=f"job-{job}",
        arguments=spec.command,
        environment={"JOBWORKER_JOB_ID": str(job), **spec.environment, **secret_environment},
        workdir=spec.workdir,
        network=spec.network,
        disk_bytes=spec.limits.disk_bytes or 0,
        runtime=spec.runtime,
        volumes=tuple((mount.name, mount.place) for mount in spec.volumes),
        uid=spec.uid,
        gid=spec.uid if spec.gid is None else spec.gid,
        init=spec.init,
    )


def limits_of(spec: JobSpec) -> cgroups.ScopeLimits:
    """What its control groups bound."""
    limits = spec.limits
    return cgroups.ScopeLimits(
        cpu_percent=limits.cpu_percent or 0,
        memory_bytes=limits.memory_bytes or 0,
        io_bps=limits.io_bps or 0,
        pids=limits.processes or 0,
        cores=spec.cpu_cores,
    )
