"""A reload names what it cannot change, and keeps nobody waiting."""

import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from jobworker.config.roles import RoleSettings, role_table
from jobworker.config.settings import SecuritySettings, Settings
from jobworker.incidents import Incidents
from jobworker.jobs.history.history import History
from jobworker.pki.administration import init_authority
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.authorization import Authorization
from jobworker.server.access.connected_clients import ConnectedClients, TlsState
from jobworker.server.reporting.notify import Notifier
from jobworker.server.startup import reload as reload_module
from jobworker.server.startup.configuration_reader import (
    ConfigurationReader,
    ConfigurationSnapshot,
    configured_files,
)
from jobworker.server.startup.reload import REFUSED, ReloadContext, _waiting_for_a_start, reload

from ..conftest import drained


class ReaderOf(ConfigurationReader):
    """A reader that returns what it was made with."""

    def __init__(self, snapshot: ConfigurationSnapshot) -> None:
        self._snapshot = snapshot

    async def read(self) -> ConfigurationSnapshot:
        """See ConfigurationReader."""
        return self._snapshot


def test_nothing_changed_names_nothing() -> None:
    assert _waiting_for_a_start(Settings(), Settings()) == []


def test_each_key_that_waits_for_a_start_is_named_and_no_other() -> None:
    before = Settings()
    now = evolve(
        before,
        worker=evolve(before.worker, max_waiting_jobs=7),
        roles={"x": RoleSettings(operations=())},
        logging=evolve(before.logging, level="DEBUG"),
    )
    assert _waiting_for_a_start(before, now) == ["worker.max_waiting_jobs"]


def security_of(certs: Path) -> SecuritySettings:
    return evolve(
        Settings().security,
        ca_cert=str(certs / "ca-cert.pem"),
        server_cert=str(certs / "server-cert.pem"),
        server_key=str(certs / "server-key.pem"),
        crl="",
    )


def door_of(certs: Path) -> ConnectedClients:
    init_authority(certs, [], now=datetime.now(UTC))
    security = security_of(certs)
    authorization = Authorization(role_table({}), longest_seconds=60)
    return ConnectedClients(
        TlsState.of(configured_files(security), security), authorization, Incidents()
    )


def reader_that_has_ended() -> ConfigurationReader:
    near, far = socket.socketpair()
    far.close()
    near.setblocking(False)
    return ConfigurationReader(near, 0)


async def test_supervisor_without_room_keeps_only_the_reload_waiting(
    full: tuple[Notifier, socket.socket, int],
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    notifier, supervisor, count = full
    history = History.open(tmp_path / "history.db")
    context = ReloadContext(
        reader=reader_that_has_ended(),
        clients=door_of(tmp_path / "certs"),
        notifier=notifier,
        auditor=Auditor(history, lambda: datetime.now(UTC)),
        incidents=Incidents(),
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reload, context, Settings())
            await trio.testing.wait_all_tasks_blocked()
            drained(supervisor, count)
        assert supervisor.recv(100).startswith(b"RELOADING=1\n")
        assert supervisor.recv(100).decode() == f"READY=1\nSTATUS={REFUSED}"
    finally:
        history.close()


async def test_fault_behind_a_reload_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would end the receiver of signals, and with it the service."""
    history, incidents = History.open(tmp_path / "history.db"), Incidents()
    clients = door_of(tmp_path / "certs")
    before = clients.tls_state
    security = security_of(tmp_path / "certs")
    settings = evolve(Settings(), security=security)
    context = ReloadContext(
        reader=ReaderOf(ConfigurationSnapshot(settings, configured_files(security))),
        clients=clients,
        notifier=Notifier(),
        auditor=Auditor(history, lambda: datetime.now(UTC)),
        incidents=incidents,
    )

    def fail(*_: object) -> None:
        raise ValueError("a name that cannot be read")

    monkeypatch.setattr(reload_module, "expiry_warnings", fail)
    try:
        await reload(context, settings)
        assert clients.tls_state is not before
        assert incidents.statistics() == {"reload": 1}
    finally:
        history.close()
