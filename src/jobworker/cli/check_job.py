"""One whole job, by a launcher of its own: the proof that `worker check` ends with.

What each probe tries alone has to hold together too, in the order of a job's start. The trial
launcher stands beside a service that may run: with its own directory, groups and range of ids.
"""

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from attrs import evolve

from jobworker.cli.check_service import nearest_directory
from jobworker.config import Settings
from jobworker.errors import HostUnsupported, JobworkerError
from jobworker.model.job import JobId
from jobworker.sandbox.cgroups import Limits
from jobworker.sandbox.launch import start_launcher
from jobworker.sandbox.link import Link, open_link
from jobworker.sandbox.plan import Order
from jobworker.sandbox.probing import Finding
from jobworker.sandbox.user_namespaces import IDS_PER_JOB
from jobworker.server.setup import policy_for

SECONDS = 30
_PROOF = "echo works from inside"


async def whole_job(settings: Settings) -> Finding:
    """Start a real job within the default limits and hear it speak."""
    name = "start, limits, output, end"
    try:
        async with _trial_directory(settings) as state:
            said = await _job_says(_trial_settings(settings, state))
    except JobworkerError as error:
        return Finding("a whole job", name, False, True, error.message, error.remedy)
    except OSError as error:
        return Finding("a whole job", name, False, True, str(error), "")
    return Finding("a whole job", name, True, True, said, "")


@asynccontextmanager
async def _trial_directory(settings: Settings) -> AsyncIterator[Path]:
    """A directory where the service's own is, or would be: what holds there has to hold."""
    above = nearest_directory(Path(settings.worker.state_dir))
    try:
        state = Path(tempfile.mkdtemp(prefix=".check-", dir=above))
    except OSError:
        state = Path(tempfile.mkdtemp(prefix="jobworker-check-", dir="/var/tmp"))
    try:
        for part in ("stage", "scratch"):
            (state / part).mkdir(mode=0o700)
        yield state
    finally:
        shutil.rmtree(state)


async def _job_says(settings: Settings) -> str:
    defaults = settings.worker.default_limits
    limits = Limits(
        cpu_percent=defaults.cpu_percent or 0,
        memory_bytes=defaults.memory_bytes or 0,
        io_bps=defaults.io_bps or 0,
        pids=defaults.processes or 0,
    )
    launcher = start_launcher(policy_for(settings, Path(settings.worker.state_dir)))
    async with open_link(launcher) as link:
        with trio.fail_after(SECONDS):
            return await _speak(link, limits)


async def _speak(link: Link, limits: Limits) -> str:
    order = Order("check", ("/bin/sh", "-c", _PROOF), {}, "/")
    began = trio.current_time()
    started, exits = await link.spawn(JobId(1), order, limits)
    async with (
        trio.lowlevel.FdStream(started.stdout) as out,
        trio.lowlevel.FdStream(started.stderr),
    ):
        said = b"".join([piece async for piece in out])
        ended = await exits.receive()
    await link.remove(JobId(1))
    if said != b"works from inside\n" or ended.code:
        raise HostUnsupported(f"cannot run a job: it said {said!r} and ended with {ended.code}")
    return f"{1000 * (trio.current_time() - began):.0f} ms"


def _trial_settings(settings: Settings, state: Path) -> Settings:
    """The settings for a launcher beside one that may run: other files, another range of ids."""
    worker = evolve(settings.worker, state_dir=str(state), max_concurrent_jobs=1)
    sandbox = evolve(settings.sandbox, first_uid=spare_range(settings), spares=0)
    return evolve(settings, worker=worker, sandbox=sandbox)


def spare_range(settings: Settings) -> int:
    """The first of a range of ids that no job of this service uses."""
    worker, sandbox = settings.worker, settings.sandbox
    ranges = worker.max_concurrent_jobs + sandbox.spares
    # The range after the last one has the service's own id in it.
    beyond = sandbox.first_uid + (ranges + 1) * IDS_PER_JOB
    return beyond if beyond + IDS_PER_JOB < 1 << 32 else sandbox.first_uid
