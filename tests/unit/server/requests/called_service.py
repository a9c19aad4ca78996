"""Operations called by clients of several roles: a real supervisor over a played launcher."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import trio
from attrs import define, evolve, field

from jobworker.config.roles import RoleSettings, role_table
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.access import Permission, Role, Roles, Scope
from jobworker.model.job import JobId, JobRecord, JobSpec, Usage
from jobworker.model.volumes import Volume
from jobworker.pki.identity import Identity
from jobworker.protocol.messages import RunResult
from jobworker.protocol.methods import METHODS
from jobworker.protocol.session import Encoded
from jobworker.sandbox.service.host_facts import HostFacts
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.sandbox.start.plan import Order
from jobworker.serialization.json_text import loads
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.authorization import Authorization, Caller
from jobworker.server.delivery.subscriptions import Subscriptions
from jobworker.server.fairness.connection_limiter import ConnectionLimiter
from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.send_budget import SendBudget
from jobworker.server.fairness.wait_quota import WaitQuota
from jobworker.server.host.disk_promises import DiskPromises
from jobworker.server.requests.operations import OperationContext, call

from ...jobs.kept_launcher import KeptLauncher
from ...jobs.played_link import ServiceLink
from ...jobs.played_program import Behaviour, Program
from ...jobs.played_service import PlayedService
from ...jobs.told import Told

LONGEST_SECONDS = 3600.0
MAX_FOLLOWS, MAX_WAITS = 2, 3
HOST = HostFacts(cpus=2, memory_bytes=(1 << 30) + 1, cores=frozenset({0, 3}))
USAGE = Usage(cpu_ns=5, memory_bytes=7)
OPERATOR = (Permission.RUN, Permission.STOP, Permission.REMOVE, Permission.VIEW, Permission.LOG)
ROLES = {
    "operator": RoleSettings(operations=OPERATOR, max_jobs=3),
}
NAMES = {"root": "admin", "eve": "viewer", "alice": "operator", "bob": "operator"}
"""The clients, and their roles."""


class Behaviours(dict[str, Behaviour]):
    """Programs run until a signal; `absent` is never found."""

    def __missing__(self, name: str) -> Behaviour:
        starts = ["refused"] if name == "absent" else []
        return Behaviour(starts=starts, on_signal="exits")  # type: ignore[arg-type]


@define(eq=False)
class Volumes:
    """The part of a launcher that has volumes."""

    made: dict[str, Volume] = field(factory=dict)

    async def make_volume(self, name: str, size_bytes: int, *, thin: bool) -> None:
        await trio.lowlevel.checkpoint()
        self.made[name] = Volume(name=name, size_bytes=size_bytes, thin=thin)

    async def volumes(self) -> tuple[Volume, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(self.made.values())

    async def remove_volume(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        del self.made[name]


async def usage(_: ServiceLink, __: JobId) -> Usage:
    """What each job uses."""
    await trio.lowlevel.checkpoint()
    return USAGE


async def plan(_: ServiceLink, order: Order, __: object) -> list[tuple[str, str, str]]:
    """The steps of every start."""
    await trio.lowlevel.checkpoint()
    return [("execute", order.arguments[0], "Execute the program.")]


@define(eq=False, kw_only=True)
class CalledService:
    """A service, and the connections of its clients."""

    context: OperationContext
    launcher: KeptLauncher
    volumes: Volumes
    played: PlayedService
    _roles: dict[str, str] = field(factory=lambda: dict(NAMES))
    """Each client's role."""
    _clients: dict[str, Caller] = field(factory=dict)

    @property
    def supervisor(self) -> Supervisor:
        return self.played.supervisor

    def client(self, name: str) -> Caller:
        """The connection of a client."""
        if name not in self._clients:
            identity = Identity(
                common_name=name,
                role=self._roles[name],
                serial="01",
                not_after=datetime(2030, 1, 1, tzinfo=UTC),
            )
            context = self.context
            subscriptions = Subscriptions(
                self.supervisor, context.send_budget, 1, MAX_FOLLOWS, context.waits, name
            )
            self._clients[name] = Caller(
                identity=identity,
                subscriptions=subscriptions,
                authorization=context.authorization,
                peer="127.0.0.1:1",
                cost=context.calls.connection(name).begin(),
            )
        return self._clients[name]

    def grant(self, name: str, *permissions: Permission, scope: Scope = Scope.ALL) -> None:
        """Give a client a role of its own, as a reload of the configuration may."""
        authorization, role = self.context.authorization, self._roles.setdefault(name, name)
        own = Role(name=role, permissions=frozenset(permissions), scope=scope)
        authorization.roles = Roles({each.name: each for each in (*authorization.roles, own)})

    async def call(self, who: str, method: str, **params: object) -> object:
        """Call a method as a client; JSON comes as plain values."""
        row = METHODS[method]
        caller = evolve(self.client(who), cost=self.context.calls.connection(who).begin())
        with caller.cost:
            result = await call(self.context, caller, row, row.params(**params))
        return loads(result.text) if isinstance(result, Encoded) else result

    async def run(self, who: str, *command: str, **spec: object) -> JobRecord:
        """Run a job as a client."""
        job = JobSpec(command=command or ("any",), **spec)  # type: ignore[arg-type]
        result = await self.call(who, "job.run", job=job)
        assert isinstance(result, RunResult)
        return result.job

    def program(self, job: JobRecord) -> Program:
        """The program of a job that runs."""
        return self.launcher.programs[job.id]

    async def end(self, job: JobRecord, code: int = 0) -> JobRecord:
        """Have a job's program exit, and wait until the service has the end and all output."""
        execution = self.supervisor.live(job.id)
        assert execution is not None
        self.launcher.end(self.program(job), code, None)
        await execution.forgotten.wait()
        return await self.supervisor.record(job.id)

    async def run_to_its_end(self, who: str, output: bytes = b"", **spec: object) -> JobRecord:
        """A job that has written and ended."""
        job = await self.run(who, **spec)
        if output:
            os.write(self.program(job).writes[0], output)
        return await self.end(job)

    def audited(self) -> list[tuple[str, str, str, int | None]]:
        """What the audit log would have: name, action, outcome, job."""
        waiting = self.context.auditor._waiting
        return [(row.name, row.action, row.outcome, row.job) for row in waiting]


@asynccontextmanager
async def open_called_service(directory: Path) -> AsyncIterator[CalledService]:
    """Run a service in `directory`. The caller gives `ServiceLink` the methods above."""
    (directory / "spool").mkdir()
    launcher, volumes = KeptLauncher(Behaviours(), []), Volumes()
    async with trio.open_nursery() as nursery:
        played = await PlayedService.start(nursery, directory, launcher, Told())
        active_clients = ActiveClients()
        context = OperationContext(
            supervisor=played.supervisor,
            launcher=cast(LauncherClient, volumes),
            promises=DiskPromises(
                launcher=cast(LauncherClient, volumes), directory=directory, budget=None, most=0
            ),
            host=HOST,
            runtimes=frozenset({"python", "node"}),
            authorization=Authorization(role_table(ROLES), LONGEST_SECONDS),
            auditor=Auditor(played.supervisor._history, played.supervisor.now),
            incidents=played.incidents,
            stall_seconds=1,
            limiter=ConnectionLimiter(),
            send_budget=SendBudget(active_clients),
            active_clients=active_clients,
            waits=WaitQuota(MAX_WAITS),
        )
        service = CalledService(context=context, launcher=launcher, volumes=volumes, played=played)
        try:
            yield service
        finally:
            for client in service._clients.values():
                client.subscriptions.close()
            with trio.CancelScope(shield=True):
                await played.shut_down()
