"""The service: all its tasks, in one tree of nurseries.

    service ⊃ launcher client
            ⊃ supervisor ⊃ executions
            ⊃ listener   ⊃ connections

At its start the service takes over the jobs that an earlier service has left, and then opens the
port. On SIGTERM or SIGINT it ends: it stops accepting, and stops every job, whose followers see its
end. If the launcher outlives the service, it may leave the jobs to the next service instead. Then
it ends the connections. A second signal does not cut the end short. On SIGHUP it reads
configuration and certificates again (`reload`). If the launcher is gone, no job can be started or
stopped any more. Then the service ends too, with an error, and its supervisor (systemd) starts both
anew.
"""

import logging
import signal
import socket
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio
from attrs import define, evolve, field

from jobworker.config.roles import role_table
from jobworker.config.settings import Settings
from jobworker.errors import LauncherGone
from jobworker.incidents import Incidents
from jobworker.jobs.archive import Archive
from jobworker.jobs.history.history import History
from jobworker.jobs.output.budget import OutputBudget
from jobworker.jobs.retention_policy import RetentionPolicy
from jobworker.jobs.rules import Rules
from jobworker.jobs.supervisor import Supervisor
from jobworker.jobs.takeover import take_over
from jobworker.model.units import MEBIBYTE, parse_duration
from jobworker.sandbox.service.host_facts import read_host_facts
from jobworker.sandbox.service.launcher_client import LauncherClient, open_launcher_client
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.authorization import Authorization
from jobworker.server.access.connected_clients import ConnectedClients
from jobworker.server.connection import serve_connection, turn_away
from jobworker.server.connections.batch_listener import BatchListener
from jobworker.server.connections.listening import listen
from jobworker.server.fairness.connection_limiter import ConnectionLimiter
from jobworker.server.fairness.fair_scheduling import ActiveClients
from jobworker.server.fairness.send_budget import SendBudget
from jobworker.server.fairness.wait_quota import WaitQuota
from jobworker.server.host.disk_promises import DiskPromises, disks_bytes, promise_warnings
from jobworker.server.host.memory import keep_small, settle
from jobworker.server.host.service_user import launcher_ids
from jobworker.server.reporting.notify import ADDRESS_FIELD, Notifier
from jobworker.server.requests.operations import OperationContext
from jobworker.server.startup.preparation import Prepared
from jobworker.server.startup.process_setup import ENDS, ignore_ends, keep_ends, kept_end
from jobworker.server.startup.reload import (
    ReloadContext,
    report_reader_end,
    serve_reloads,
    warn_of_expiry_daily,
)

log = logging.getLogger("jobworker.server")

FAREWELL_SECONDS = 1.0
"""The time for clients to take their last replies and the closing frame, and to close in turn.

Most connections end much sooner.
"""
SWITCH_SECONDS = 0.0001
"""How long a thread may keep the interpreter's lock while the event loop waits for the lock."""


def _now() -> datetime:
    return datetime.now(UTC)


def _rules(settings: Settings, *, bounds_disks: bool) -> Rules:
    worker = settings.worker
    disk = settings.sandbox.disk_limit * MEBIBYTE if bounds_disks else None
    return Rules(
        defaults=evolve(worker.default_limits, disk_bytes=disk),
        timeout_seconds=parse_duration(worker.job_timeout),
        stop_grace_seconds=parse_duration(worker.stop_grace),
        at_max_output=worker.at_max_output,
        on_disk_full=worker.on_disk_full,
    )


def retention_policy(settings: Settings) -> RetentionPolicy:
    """The configured bounds for ended jobs' output: age, number of jobs, bytes."""
    worker = settings.worker
    return RetentionPolicy(
        max_age_seconds=parse_duration(worker.keep_output_age) or None,
        max_jobs=worker.keep_output_jobs or None,
        max_bytes=worker.max_total_output * MEBIBYTE or None,
    )


def _archive(prepared: Prepared, spools: Path, history: History) -> Archive:
    worker = prepared.settings.worker
    return Archive(
        spools=spools,
        history=history,
        policy=retention_policy(prepared.settings),
        max_open=prepared.max_open_outputs,
        budget=OutputBudget(
            spools, worker.max_total_output * MEBIBYTE, worker.keep_free * MEBIBYTE
        ),
        clock=_now,
    )


async def serve(prepared: Prepared) -> None:
    """Serve until a signal; raises LauncherGone if the launcher ends before."""
    sys.setswitchinterval(SWITCH_SECONDS)
    settings, incidents = prepared.settings, Incidents()
    history = History.open(prepared.directory / "history.db", prepared.directory / "spool")
    try:
        spools = prepared.directory / "spool"
        async with open_launcher_client(prepared.launcher) as launcher:
            inheritance = await take_over(launcher, history, spools, _now())
            archive = _archive(prepared, spools, history)
            await archive.load(inheritance.ids)
            supervisor = Supervisor(
                launcher=launcher,
                history=history,
                archive=archive,
                spools=spools,
                rules=_rules(settings, bounds_disks=prepared.launcher.bounds_disks),
                clock=_now,
                incidents=incidents,
                max_running=_max_running(prepared),
                max_waiting=settings.worker.max_waiting_jobs,
            )
            supervisor.take_over(inheritance)
            auditor = Auditor(history, _now)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incidents.keep_running, "audit", auditor.serve)
                nursery.start_soon(incidents.keep_running, "memory", keep_small)
                promises = DiskPromises(
                    launcher=launcher,
                    directory=prepared.directory,
                    budget=archive.budget if _leaves_room_for_disks(prepared) else None,
                    most=disks_bytes(settings),
                )
                if _knows_promises(prepared):
                    nursery.start_soon(incidents.keep_running, "disks", promises.follow)
                auditor.service("service.start")
                await _serve_until_signal(
                    prepared, supervisor, launcher, auditor, incidents, promises
                )
                auditor.service("service.end")
                nursery.cancel_scope.cancel()
    finally:
        history.close()
        prepared.reader.close()


async def _serve_until_signal(
    prepared: Prepared,
    supervisor: Supervisor,
    launcher: LauncherClient,
    auditor: Auditor,
    incidents: Incidents,
    promises: DiskPromises,
) -> None:
    worker = prepared.settings.worker
    authorization = Authorization(
        role_table(prepared.settings.roles), parse_duration(worker.max_job_timeout)
    )
    clients = ConnectedClients(prepared.tls_state, authorization, incidents)
    active_clients = ActiveClients()
    context = OperationContext(
        supervisor=supervisor,
        launcher=launcher,
        promises=promises,
        host=read_host_facts(),
        runtimes=frozenset(prepared.settings.runtimes),
        authorization=authorization,
        auditor=auditor,
        incidents=incidents,
        stall_seconds=parse_duration(prepared.settings.server.stall_timeout),
        limiter=ConnectionLimiter(
            prepared.settings.limits, job_ids=launcher_ids(prepared.launcher)
        ),
        active_clients=active_clients,
        send_budget=SendBudget(active_clients),
        waits=WaitQuota(prepared.settings.limits.max_waits),
    )
    listener = _Listener(prepared, clients, context)
    settle()
    listen(prepared.listeners)
    keep_ends()  # those that the receiver leaves over at its end too, which it sends once more
    with trio.open_signal_receiver(*ENDS) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.serve)
            nursery.start_soon(_watch, launcher, not prepared.settings.launcher.socket)
            tell_watchdog = partial(_tell_watchdog, prepared.notifier)
            nursery.start_soon(incidents.keep_running, "watchdog", tell_watchdog)
            nursery.start_soon(listener.serve)
            warn_daily = partial(warn_of_expiry_daily, prepared.reader)
            nursery.start_soon(incidents.keep_running, "expiry", warn_daily)
            tell_end = partial(report_reader_end, prepared.reader, prepared.notifier, auditor)
            nursery.start_soon(incidents.keep_running, "reader", tell_end)
            reloading = ReloadContext(
                reader=prepared.reader,
                clients=clients,
                notifier=prepared.notifier,
                auditor=auditor,
                incidents=incidents,
            )
            await nursery.start(serve_reloads, reloading, prepared.configured)
            await _announce(prepared)
            first = kept_end() or signal.Signals(await anext(signals))
            log.info("ending: %s", first.name)
            await prepared.notifier.notify(STOPPING="1")
            listener.stop_accepting()
            if _leaves_jobs(prepared.settings):
                await supervisor.leave()
            else:
                await supervisor.shut_down(parse_duration(prepared.settings.worker.stop_grace))
            clients.close()
            with trio.move_on_after(FAREWELL_SECONDS):
                await listener.idle.wait()
            nursery.cancel_scope.cancel()
    ignore_ends()
    log.info("ended")


def _max_running(prepared: Prepared) -> int:
    """How many jobs may run at a time: an earlier launcher may have room for fewer than set."""
    wanted, room = (
        prepared.settings.worker.max_concurrent_jobs,
        prepared.launcher.policy["max_jobs"],
    )
    assert isinstance(room, int)
    return min(wanted, room)


def _knows_promises(prepared: Prepared) -> bool:
    """Whether the launcher bounds jobs' disks and reports what they may still take.

    A launcher of an earlier version does not.
    """
    return prepared.launcher.bounds_disks and "overcommit" in prepared.launcher.policy


def _leaves_room_for_disks(prepared: Prepared) -> bool:
    """Whether output must leave room for the bytes that live jobs' disks may still take.

    Not if the disks are promised more than the host has: no room would be left for output then.
    """
    settings = prepared.settings
    return (
        settings.worker.keep_free > 0
        and _knows_promises(prepared)
        and not (
            settings.sandbox.overcommit_disk and promise_warnings(settings, prepared.directory)
        )
    )


def _leaves_jobs(settings: Settings) -> bool:
    wanted = settings.worker.jobs_on_exit
    return wanted == "leave" or (wanted == "auto" and bool(settings.launcher.socket))


async def _announce(prepared: Prepared) -> None:
    host, port = prepared.listeners[0].getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    log.info("limits by cgroup %s", prepared.launcher.cgroup_kind)
    for warning in prepared.warnings:
        log.warning("%s", warning)
    log.info("listening on %s", address)
    status = f"listening on {address}"
    await prepared.notifier.notify(READY="1", STATUS=status, **{ADDRESS_FIELD: address})


async def _watch(launcher: LauncherClient, is_own: bool) -> None:
    await launcher.gone.wait()
    where = "its last lines above" if is_own else "the reason in the log of `worker launcher`"
    raise LauncherGone(
        "cannot go on: the launcher has ended",
        remedy=f"see {where}, and start {'again' if is_own else 'both again'}",
    )


async def _tell_watchdog(notifier: Notifier) -> None:
    """Send keep-alive messages to systemd's watchdog as long as the event loop runs tasks."""
    if not notifier.watchdog_seconds:
        await trio.sleep_forever()
    while True:
        notifier.notify_watchdog()
        await trio.sleep(notifier.watchdog_seconds / 3)


@define(eq=False)
class _Listener:
    """The service's listeners: accepts connections, and serves each until it ends."""

    _prepared: Prepared
    _clients: ConnectedClients
    _context: OperationContext
    _accepting: trio.CancelScope = field(factory=trio.CancelScope)
    idle: trio.Event = field(factory=trio.Event)
    """Set once accepting has stopped and the last connection has ended."""

    async def serve(self) -> None:
        """Accept connections until `stop_accepting`, and return when the last one has ended."""
        active_clients = self._context.active_clients
        listeners = [
            BatchListener(each, self._turn_away, active_clients)
            for each in self._prepared.listeners
        ]
        async with trio.open_nursery() as connections:
            with self._accepting:
                await trio.serve_listeners(self._serve_one, listeners, handler_nursery=connections)
        self.idle.set()

    def _turn_away(self, accepted: socket.socket) -> bool:
        try:
            return turn_away(accepted, self._context.limiter)
        except Exception:  # noqa: BLE001 - recorded; here it would end the service
            self._context.incidents.record("listener", "a connection that has just come")
            return False

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        await serve_connection(stream, self._clients, self._context)

    def stop_accepting(self) -> None:
        """Close the listeners; open connections go on."""
        self._accepting.cancel()
