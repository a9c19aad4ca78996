"""One service without a network: the real supervisor, history and output over a played launcher.

The supervisor's calls are made by clients, each a task, as connections make them.
"""

import os
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Self

import trio
from attrs import define, field

from jobworker.errors import JobworkerError
from jobworker.incidents import Incidents
from jobworker.jobs.archive import Archive
from jobworker.jobs.history.history import History
from jobworker.jobs.history.search import Filter
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.rules import Rules
from jobworker.jobs.supervisor import Supervisor
from jobworker.jobs.takeover import take_over
from jobworker.model.job import JobId, JobRecord, Limits
from jobworker.sandbox.channel import close_all
from jobworker.serialization.convert import structure
from jobworker.serialization.json_text import loads

from .kept_launcher import KeptLauncher
from .played_link import ServiceLink
from .told import Told

RULES = Rules(
    defaults=Limits(cpu_percent=0, memory_bytes=0, io_bps=0, processes=0, output_bytes=0),
    timeout_seconds=0,
    stop_grace_seconds=5,
    at_max_output="discard-output",
    on_disk_full="discard-output",
)
FAREWELL_SECONDS = 1.0


def now() -> datetime:
    """The time of day, by Trio's clock."""
    return datetime(2026, 11, 24, tzinfo=UTC) + timedelta(seconds=trio.current_time())


@define(eq=False, kw_only=True)
class PlayedService:
    """A service that runs, or leaves."""

    supervisor: Supervisor
    budget: OutputBudget
    incidents: Incidents
    told: Told
    """What its clients hear."""
    leaving: bool = field(default=False, init=False)
    gone: trio.Event = field(factory=trio.Event, init=False)
    waiting: int = field(default=0, init=False)
    """How many clients wait for an answer."""
    stopping: Counter[JobId] = field(factory=Counter, init=False)
    """Whose ends clients of this service have asked for: how many of them wait still."""
    _nursery: trio.Nursery
    _directory: Path
    _link: ServiceLink
    _killed: bool = field(default=False, init=False)
    _over: trio.Event = field(factory=trio.Event, init=False)

    @classmethod
    async def start(
        cls, nursery: trio.Nursery, directory: Path, launcher: KeptLauncher, told: Told
    ) -> Self:
        """Start a service in the background. Raises what keeps it from its start."""
        serve = partial(cls._serve, directory, launcher, told)
        return await nursery.start(serve)  # type: ignore[no-any-return]

    @classmethod
    async def _serve(
        cls,
        directory: Path,
        launcher: KeptLauncher,
        told: Told,
        *,
        task_status: trio.TaskStatus[Self] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        open_before, spools = _descriptors(), directory / "spool"
        link = ServiceLink.connect(launcher)
        history = None
        try:
            history = History.open(directory / "history.db", spools)
            inheritance = await take_over(link, history, spools, now())  # type: ignore[arg-type]
            budget, incidents = OutputBudget(spools), Incidents()
            archive = Archive(
                spools=spools, history=history, policy=RetentionPolicy(), budget=budget, clock=now
            )
            await archive.load(inheritance.ids)
        except BaseException:
            link.disconnect()
            if history is not None:
                history.close()
            close_all(sorted(_descriptors() - open_before))  # as the end of the process does
            raise
        service = None
        try:
            supervisor = Supervisor(
                launcher=link,  # type: ignore[arg-type]
                history=history,
                archive=archive,
                spools=spools,
                rules=RULES,
                clock=now,
                incidents=incidents,
                max_running=2,
                max_waiting=3,
            )
            supervisor.take_over(inheritance)
            async with trio.open_nursery() as nursery:
                service = cls(
                    supervisor=supervisor,
                    budget=budget,
                    incidents=incidents,
                    told=told,
                    nursery=nursery,
                    directory=directory,
                    link=link,
                )
                link.service = service
                nursery.start_soon(supervisor.serve)
                task_status.started(service)
                await service._over.wait()
                nursery.cancel_scope.cancel()
        except Exception:
            if not (service and service._killed):
                raise
        finally:
            if service is None or service.answers:  # killed before anybody knew of it
                _close_files(directory)
            link.disconnect()
            history.close()
            if service is not None:
                service.gone.set()

    @property
    def answers(self) -> bool:
        """Whether clients get answers still: at its end their connections are closed."""
        return not self._over.is_set()

    async def leave(self) -> None:
        """Leave all jobs to the next service, and end."""
        self.leaving = True
        await self.supervisor.leave()
        await self._end()

    async def shut_down(self) -> None:
        """End all jobs, and end."""
        self.leaving = True
        await self.supervisor.shut_down(RULES.stop_grace_seconds)
        await self._end()

    async def _end(self) -> None:
        deadline = trio.current_time() + FAREWELL_SECONDS
        while self.waiting and trio.current_time() < deadline:  # noqa: ASYNC110
            await trio.sleep(0.1)
        self._over.set()
        await self.gone.wait()

    async def die(self) -> None:
        """Be killed at this moment: the next service must have another directory, a copy.

        No task can be stopped without its `finally`. So what comes of those has no effect: it finds
        the old directory, pipes with nothing in them, and a connection that is closed.
        """
        self._killed = True
        self._link.die()
        await self.abort()

    async def abort(self) -> None:
        """End at once, as where the launcher is gone: the end of the process closes its files."""
        self.leaving = True
        self._over.set()
        await self.gone.wait()
        self._link.close_pipes()
        _close_files(self._directory)

    def ask(
        self, call: Callable[[], Awaitable[object]], refused: Callable[[JobworkerError], object]
    ) -> None:
        """Make a call as a client; an error that it raises is told to `refused`."""

        async def client() -> None:
            try:
                await call()
            except JobworkerError as error:
                refused(error)
            except Exception:
                if not self._killed:
                    raise
            finally:
                self.waiting -= 1

        self.waiting += 1
        self._nursery.start_soon(client)

    async def list_jobs(self) -> dict[JobId, JobRecord]:
        """All jobs, as a client sees them."""
        page = await self.supervisor.latest(Filter(), 1000, "")
        records = [structure(JobRecord, loads(text)) for _, text in page.records]
        return {record.id: record for record in records}

    async def read_output(self, job: JobId) -> dict[str, bytes]:
        """All output of an ended job, by stream."""
        found = {"stdout": b"", "stderr": b""}
        with await self.supervisor.follow(job) as follower:
            offset = 0
            async for chunk in follower:
                assert chunk.offset == offset, "each byte once, in order"
                offset = chunk.end
                found[chunk.stream.value] += chunk.data
        return found

    async def wait_until_idle(self, seconds: float) -> None:
        """Wait until every client was answered and no job is live. Raises trio.TooSlowError."""
        with trio.fail_after(seconds):
            while self.waiting or self.supervisor._live:  # noqa: ASYNC110
                await trio.sleep(0.5)


def _close_files(directory: Path) -> None:
    """Close the output in `directory`, as the end of the process does."""
    files = {number: os.readlink(f"/proc/self/fd/{number}") for number in _descriptors()}
    close_all([n for n, path in files.items() if path.startswith(f"{directory}/spool/")])


def _descriptors() -> set[int]:
    found = set(map(int, os.listdir("/proc/self/fd")))
    return {number for number in found if os.path.exists(f"/proc/self/fd/{number}")}
