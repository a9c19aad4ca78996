"""A client's request as the job's first record, and as the order for the launcher. Pure."""

from collections.abc import Mapping
from datetime import datetime

from jobworker.model.job import JobId, JobRecord, JobSpec
from jobworker.sandbox.cgroup import hierarchy as cgroups
from jobworker.sandbox.start.plan import Order


def first_record(
    job: JobId, spec: JobSpec, owner: str, *, timeout_seconds: float, now: datetime
) -> JobRecord:
    """The first record of a job, without its secrets. `spec` is the client's request.

    `timeout_seconds`: the time limit of a request that names none; 0 is none.
    """
    if spec.timeout_seconds is not None:
        timeout_seconds = spec.timeout_seconds
    shown = spec.without_secrets(timeout_seconds=timeout_seconds)
    return JobRecord(id=job, spec=shown, owner=owner, created_at=now)


def order_of(spec: JobSpec, job: JobId, secret_environment: Mapping[str, str]) -> Order:
    """The launcher's order for a job. `spec` has every default filled in, and no secrets."""
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
    """The limits that the job's control groups enforce."""
    limits = spec.limits
    return cgroups.ScopeLimits(
        cpu_percent=limits.cpu_percent or 0,
        memory_bytes=limits.memory_bytes or 0,
        io_bps=limits.io_bps or 0,
        pids=limits.processes or 0,
        cores=spec.cpu_cores,
    )
