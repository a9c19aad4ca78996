"""Run one whole job with a launcher of its own: the proof at the end of `worker check`.

The probes test each feature alone; a job needs all of them together, in the order of its start. A
service may run meanwhile, so this trial launcher has its own directory, control groups and ids.
"""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from attrs import evolve

from jobworker.cli.worker.check_service import nearest_directory
from jobworker.config.settings import Settings
from jobworker.errors import HostUnsupported, JobworkerError
from jobworker.model.job import JobId
from jobworker.sandbox.cgroup.hierarchy import ScopeLimits
from jobworker.sandbox.check.probing import Finding
from jobworker.sandbox.service.launch import start_launcher
from jobworker.sandbox.service.launcher_client import LauncherClient, open_launcher_client
from jobworker.sandbox.start.plan import Order
from jobworker.server.host.id_ranges import lock_ids
from jobworker.server.startup.preparation import policy_for

SECONDS = 30
_PROOF = "echo works from inside"
_REMEDIES = {
    "host": "",
    "none": "use a kernel with CONFIG_NET_NS",
    "private": "install slirp4netns (Debian package slirp4netns), and allow /dev/net/tun",
}


async def whole_jobs(settings: Settings, first_uid: int) -> list[Finding]:
    """Run one job with the default limits in each kind of network, and check its output.

    The jobs have the user ids from `first_uid` on: see `trial_ids`.
    """
    try:
        async with _trial_directory(settings) as state:
            return await _try_networks(_trial_settings(settings, state, first_uid))
    except JobworkerError as error:
        return [_finding("host", error.message, error.remedy)]
    except OSError as error:
        return [_finding("host", str(error))]


def _finding(network: str, detail: str, remedy: str = "", *, works: bool = False) -> Finding:
    name = "start, limits, output, end" if network == "host" else f"--network={network}"
    return Finding("a whole job", name, works, network == "host", detail, remedy)


@asynccontextmanager
async def _trial_directory(settings: Settings) -> AsyncIterator[Path]:
    """Make a trial directory beside the service's own, to test the same file system."""
    above = nearest_directory(Path(settings.worker.state_dir))
    try:
        state = Path(tempfile.mkdtemp(prefix=".check-", dir=above))
    except OSError:
        state = Path(tempfile.mkdtemp(prefix="jobworker-check-", dir="/var/tmp"))
    try:
        for part in ("stage", "scratch", "volumes"):
            (state / part).mkdir(mode=0o700)
        yield state
    finally:
        shutil.rmtree(state)


async def _try_networks(settings: Settings) -> list[Finding]:
    defaults = settings.worker.default_limits
    limits = ScopeLimits(
        cpu_percent=defaults.cpu_percent or 0,
        memory_bytes=defaults.memory_bytes or 0,
        io_bps=defaults.io_bps or 0,
        pids=defaults.processes or 0,
    )
    found = []
    launcher = start_launcher(policy_for(settings, Path(settings.worker.state_dir)))
    async with open_launcher_client(launcher) as link:
        for number, network in enumerate(("host", "none", "private"), start=1):
            try:
                with trio.fail_after(SECONDS):
                    took = await _run_job(link, JobId(number), network, limits)
            except JobworkerError as error:
                found.append(_finding(network, error.message, error.remedy or _REMEDIES[network]))
            except trio.TooSlowError:
                found.append(_finding(network, f"the job did not end within {SECONDS} s"))
            else:
                found.append(_finding(network, took, works=True))
    return found


async def _run_job(link: LauncherClient, job: JobId, network: str, limits: ScopeLimits) -> str:
    order = Order("check", ("/bin/sh", "-c", _PROOF), {}, "/", network)
    began = trio.current_time()
    started, exits = await link.spawn(job, order, limits)
    out, err = trio.lowlevel.FdStream(started.stdout), trio.lowlevel.FdStream(started.stderr)
    async with out, err:
        output = b"".join([piece async for piece in out])
        ended = await exits.receive()
    await link.remove(job)
    if output != b"works from inside\n" or ended.code:
        raise HostUnsupported(
            f"cannot run a job: it printed {output!r} and ended with code {ended.code}"
        )
    return f"{1000 * (trio.current_time() - began):.0f} ms"


def _trial_settings(settings: Settings, state: Path, first_uid: int) -> Settings:
    """The settings of the trial launcher: other files and ids than those of a service."""
    worker = evolve(settings.worker, state_dir=str(state), max_concurrent_jobs=1)
    sandbox = evolve(settings.sandbox, first_uid=first_uid, spares=0)
    return evolve(settings, worker=worker, sandbox=sandbox)


@contextmanager
def trial_ids(settings: Settings) -> Iterator[int]:
    """Reserve a range of user ids that nothing else on this host uses, for the block.

    Yields the first id; 0 for an ordinary user, who has no range to choose. Raises ConfigError.
    """
    if os.geteuid():
        yield 0
        return
    ids = lock_ids(_trial_settings(settings, Path(settings.worker.state_dir), 0))
    try:
        yield ids.first
    finally:
        os.close(ids.descriptor)
