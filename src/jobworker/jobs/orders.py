"""What is asked of the launcher for a job: its order and its limits, from what the client said."""

from collections.abc import Mapping

from jobworker.model.job import JobId, JobSpec
from jobworker.sandbox import cgroups
from jobworker.sandbox.plan import Order


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


def limits_of(spec: JobSpec) -> cgroups.Limits:
    """What its control groups bound."""
    limits = spec.limits
    return cgroups.Limits(
        cpu_percent=limits.cpu_percent or 0,
        memory_bytes=limits.memory_bytes or 0,
        io_bps=limits.io_bps or 0,
        pids=limits.processes or 0,
        cores=spec.cpu_cores,
    )
