"""The budget of file descriptors: everything the configuration allows has to fit RLIMIT_NOFILE.

A process that has no descriptor left can neither accept a connection nor open a file, and many
things fail at once. So at its start the service adds up the most descriptors that clients can make
it open, and compares the sum with the hard limit (getrlimit(2)). If they do not fit, it refuses the
configuration before it changes anything. The rest of the limit bounds how many ended jobs' outputs
are open at a time, also for clients that followed the job before its end. For one more, an output
is closed under the readers of the owner with the most, or the reader gets an error of its own name
(`Archive.reading`).

    each running job        2 pipes, 3 files of its output
    each waiting job        3 files of its output
    each connection         its socket, also while it shakes hands
    each ended job's output 3 files, for all of its followers together
"""

from jobworker.config.settings import Settings
from jobworker.errors import HostUnsupported

OWN = 160
"""The service's own descriptors: the history and its readers, the log, the launcher, the reader,
listeners, threads' epolls, and files that are open for a moment only."""
PER_RUNNING, PER_WAITING, PER_CONNECTION, PER_OUTPUT = 5, 3, 1, 3
MIN_OUTPUTS = 16


def outputs_within(settings: Settings, limit: int, *, running: int = 0) -> int:
    """How many ended jobs' outputs may be read at a time, with `limit` descriptors in all.

    `running` is the number of jobs that run already; it may be more than the configuration allows.
    Raises HostUnsupported if the descriptors for jobs and connections do not fit.
    """
    worker, limits = settings.worker, settings.limits
    jobs = PER_RUNNING * max(worker.max_concurrent_jobs, running)
    jobs += PER_WAITING * worker.max_waiting_jobs
    connections = PER_CONNECTION * (limits.max_connections + limits.max_handshakes)
    left = limit - OWN - jobs - connections
    if left < MIN_OUTPUTS * PER_OUTPUT:
        needed = OWN + jobs + connections + MIN_OUTPUTS * PER_OUTPUT
        raise HostUnsupported(
            f"cannot serve by this configuration: {jobs} file descriptors for its jobs, "
            f"{connections} for its connections and the service's own make {needed}, "
            f"and {limit} may be open",
            remedy="raise the limit (LimitNOFILE=, ulimit -Hn), or lower "
            "worker.max_concurrent_jobs, worker.max_waiting_jobs or limits.max_connections",
        )
    return left // PER_OUTPUT
