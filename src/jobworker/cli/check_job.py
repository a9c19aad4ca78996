"""One whole job, by a launcher of its own: the proof that `worker check` ends with.

What each probe tries alone has to hold together too, in the order of a job's start. The trial
launcher stands beside a service that may run: with its own directory, groups and range of ids.
"""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from attrs import evolve

from jobworker.cli.check_service import nearest_directory
from jobworker.config.settings import Settings
from jobworker.errors import HostUnsupported, JobworkerError
from jobworker.model.job import JobId
from jobworker.sandbox.cgroup.hierarchy import Limits
from jobworker.sandbox.check.probing import Finding
from jobworker.sandbox.service.launch import start_launcher
from jobworker.sandbox.service.link import Link, open_link
from jobworker.sandbox.start.plan import Order
from jobworker.server.id_ranges import lock_ids
from jobworker.server.setup import policy_for

SECONDS = 30
_PROOF = "echo works from inside"
_REMEDIES = {
    "host": "",
    "none": "use a kernel with CONFIG_NET_NS",
    "private": "install slirp4netns (Debian package slirp4netns), and allow /dev/net/tun",
}


async def whole_jobs(settings: Settings, first_uid: int) -> list[Finding]:
    """Start real jobs within the default limits and hear them speak, in each kind of network.

    Their ids are those from `first_uid` on: see `trial_ids`.
    """
    try:
        async with _trial_directory(settings) as state:
            return await _try_networks(_trial_settings(settings, state, first_uid))
    except JobworkerError as error:
        return [_finding("host", error.message, error.remedy)]
    except OSError as error:
        return [_finding("host", str(error))]


def _finding(network: str, said: str, remedy: str = "", *, works: bool = False) -> Finding:
    name = "start, limits, output, end" if network == "host" else f"--network={network}"
    return Finding("a whole job", name, works, network == "host", said, remedy)


@asynccontextmanager
async def _trial_directory(settings: Settings) -> AsyncIterator[Path]:
    """A directory where the service's own is, or would be: what holds there has to hold."""
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
    limits = Limits(
        cpu_percent=defaults.cpu_percent or 0,
        memory_bytes=defaults.memory_bytes or 0,
        io_bps=defaults.io_bps or 0,
        pids=defaults.processes or 0,
    )
    found = []
    launcher = start_launcher(policy_for(settings, Path(settings.worker.state_dir)))
    async with open_link(launcher) as link:
        for number, network in enumerate(("host", "none", "private"), start=1):
            try:
                with trio.fail_after(SECONDS):
                    said = await _speak(link, JobId(number), network, limits)
            except JobworkerError as error:
                found.append(_finding(network, error.message, error.remedy or _REMEDIES[network]))
            except trio.TooSlowError:
                found.append(_finding(network, f"no end of it within {SECONDS} s"))
            else:
                found.append(_finding(network, said, works=True))
    return found


async def _speak(link: Link, job: JobId, network: str, limits: Limits) -> str:
    order = Order("check", ("/bin/sh", "-c", _PROOF), {}, "/", network)
    began = trio.current_time()
    started, exits = await link.spawn(job, order, limits)
    out, err = trio.lowlevel.FdStream(started.stdout), trio.lowlevel.FdStream(started.stderr)
    async with out, err:
        said = b"".join([piece async for piece in out])
        ended = await exits.receive()
    await link.remove(job)
    if said != b"works from inside\n" or ended.code:
        raise HostUnsupported(f"cannot run a job: it said {said!r} and ended with {ended.code}")
    return f"{1000 * (trio.current_time() - began):.0f} ms"


def _trial_settings(settings: Settings, state: Path, first_uid: int) -> Settings:
    """The settings for a launcher beside one that may run: other files, another range of ids."""
    worker = evolve(settings.worker, state_dir=str(state), max_concurrent_jobs=1)
    sandbox = evolve(settings.sandbox, first_uid=first_uid, spares=0)
    return evolve(settings, worker=worker, sandbox=sandbox)


@contextmanager
def trial_ids(settings: Settings) -> Iterator[int]:
    """The first of a range of ids that nobody else on this host uses, while the block lasts.

    0 for an ordinary user, who has no range to choose. Raises ConfigError.
    """
    if os.geteuid():
        yield 0
        return
    ids = lock_ids(_trial_settings(settings, Path(settings.worker.state_dir), 0))
    try:
        yield ids.first
    finally:
        os.close(ids.descriptor)
