"""A connection within this process: in whose name it takes turns, and when its client is about."""

import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from attrs import define, evolve
from tests.security.raw_socket import TEXT, frame

from jobworker.client.credentials import Credentials
from jobworker.client.websocket import WebSocket, upgrade
from jobworker.config.roles import role_table
from jobworker.config.settings import Settings
from jobworker.incidents import Incidents
from jobworker.jobs.history.history import History
from jobworker.jobs.supervisor import Supervisor
from jobworker.model.access import Permission, Roles
from jobworker.pki.administration import init_authority
from jobworker.pki.identity import name_fault
from jobworker.protocol.methods import SUBPROTOCOL
from jobworker.sandbox.service.host_facts import HostFacts
from jobworker.sandbox.service.launcher_client import LauncherClient
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.authorization import Authorization
from jobworker.server.access.connected_clients import ConnectedClients, TlsState
from jobworker.server.connection import serve_connection
from jobworker.server.fairness.connection_limiter import ConnectionLimiter
from jobworker.server.fairness.fair_scheduling import ActiveClients, FairScheduler, FairThreadPool
from jobworker.server.fairness.send_budget import SendBudget
from jobworker.server.fairness.slots import LARGE_BYTES, Slots
from jobworker.server.fairness.wait_quota import WaitQuota
from jobworker.server.host.disk_promises import DiskPromises
from jobworker.server.requests.conversation import Conversation
from jobworker.server.requests.operations import OperationContext
from jobworker.server.startup.configuration_reader import configured_files
from jobworker.tls_stream import TLSStream

NAME = "admin-client"
STALL_SECONDS = 5.0


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site") / "certs"
    init_authority(directory, [], now=datetime.now(UTC))
    return directory


@define(eq=False)
class Site:
    """A service without jobs."""

    certs: Path
    door: ConnectedClients
    context: OperationContext

    @classmethod
    def of(cls, certs: Path) -> "Site":
        security = evolve(
            Settings().security,
            ca_cert=str(certs / "ca-cert.pem"),
            server_cert=str(certs / "server-cert.pem"),
            server_key=str(certs / "server-key.pem"),
            crl="",
        )
        authorization, active_clients = (
            Authorization(role_table({}), longest_seconds=60),
            ActiveClients(),
        )
        context = OperationContext(
            supervisor=cast(Supervisor, SimpleNamespace(record=trio.sleep_forever)),
            launcher=cast(LauncherClient, None),
            promises=cast(DiskPromises, None),
            host=cast(HostFacts, None),
            runtimes=frozenset(),
            authorization=authorization,
            auditor=Auditor(cast(History, None), lambda: datetime.now(UTC)),
            incidents=Incidents(),
            stall_seconds=STALL_SECONDS,
            limiter=ConnectionLimiter(),
            active_clients=active_clients,
            send_budget=SendBudget(active_clients),
            waits=WaitQuota(1),
            replies=Slots(in_all=1, for_each=1),
            requests=Slots(in_all=1, for_each=1),
        )
        return cls(
            certs,
            ConnectedClients(
                TlsState.of(configured_files(security), security), authorization, Incidents()
            ),
            context,
        )

    @asynccontextmanager
    async def dialled(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[TLSStream]:
        """A client's end of a connection; the admin's where there is no context."""
        files = (self.certs / f"{name}.pem" for name in ("ca-cert", f"{NAME}-cert", f"{NAME}-key"))
        tls = tls or Credentials(*files).read()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        near = trio.socket.socket()
        async with trio.open_nursery() as nursery, listener:
            await near.connect(listener.socket.getsockname())
            far = await listener.accept()
            nursery.start_soon(serve_connection, far, self.door, self.context)
            async with TLSStream(trio.SocketStream(near), tls, server_name="localhost") as stream:
                await stream.do_handshake()
                yield stream
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[TLSStream, WebSocket]]:
        """A connection that is open."""
        async with self.dialled() as stream:
            yield stream, await upgrade(stream, "localhost", SUBPROTOCOL)


@pytest.fixture
def site(certs: Path) -> Site:
    return Site.of(certs)


async def ask(client: WebSocket, method: str) -> dict[str, object]:
    await client.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method}))
    reply = await client.receive()
    assert isinstance(reply, str)
    answer = json.loads(reply)
    assert isinstance(answer, dict)
    return answer


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if true():
            return
        await trio.lowlevel.checkpoint()
    pytest.fail("it does not come true")


async def test_no_name_of_a_certificate_shares_what_strangers_of_a_network_have(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = set[str]()

    async def enter(scheduler: FairScheduler, name: str, cost: int = 1) -> None:
        lines.add(name)
        await really(scheduler, name, cost)

    really = FairScheduler.wait_turn
    monkeypatch.setattr(FairScheduler, "wait_turn", enter)
    async with site.connected() as (_, client):
        assert "result" in await ask(client, "service.hello")
    assert NAME in lines
    assert len(lines) == 2, "and strangers"
    assert [name for name in lines if name_fault(name) is None] == [NAME]


async def test_handshakes_do_not_rest_for_whom_they_have_let_in_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of connections would rest for itself, and who comes behind it would wait longer."""
    lines = list[str]()

    async def enter(scheduler: FairScheduler, name: str, cost: int = 1) -> None:
        if scheduler is site.context.handshakes:
            lines.append(name)
        await really(scheduler, name, cost)

    really = FairScheduler.wait_turn
    monkeypatch.setattr(FairScheduler, "wait_turn", enter)
    active_clients = site.context.active_clients
    async with site.connected() as (_, client):
        strangers, known = lines
        assert known == NAME, "it stands behind no other name once it has shown its certificate"
        assert not active_clients.has_others({strangers: ()})
        assert not active_clients.has_others({known: ()})
        assert active_clients.has_others({" of another network": ()})
        await ask(client, "service.hello")
        assert active_clients.has_others({strangers: ()}), "it has asked"


async def test_who_has_shown_a_certificate_is_about_before_it_asks(site: Site) -> None:
    """Each command connects anew, and a flood would be in the way of its handshakes."""
    async with site.connected():
        assert site.context.active_clients.has_others(())


async def test_stranger_is_not_about(site: Site) -> None:
    """Else a few bytes would slow down all who have a certificate."""
    async with site.dialled(
        ssl.create_default_context(cafile=site.certs / "ca-cert.pem")
    ) as stream:
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert not site.context.active_clients.has_others(())


async def test_connection_keeps_only_the_certificates_that_its_check_needed(
    site: Site, tmp_path: Path
) -> None:
    """A client may send others, and they would be parsed at each reload."""
    init_authority(tmp_path / "other", [], now=datetime.now(UTC))
    tls = ssl.create_default_context(cafile=site.certs / "ca-cert.pem")
    own = (site.certs / f"{NAME}-cert.pem").read_text()
    other = (tmp_path / "other" / "ca-cert.pem").read_text()
    (tmp_path / "chain.pem").write_text(own + other * 3)
    tls.load_cert_chain(tmp_path / "chain.pem", site.certs / f"{NAME}-key.pem")
    async with site.dialled(tls) as stream:
        await upgrade(stream, "localhost", SUBPROTOCOL)
        (client,) = site.door._inside
        assert client.certificates.chain == (ssl.PEM_cert_to_DER_cert(own),)


async def test_who_sends_a_large_request_is_about_as_long_as_it_comes(site: Site) -> None:
    active_clients = site.context.active_clients
    async with site.connected() as (stream, client):
        await ask(client, "service.hello")
        active_clients._until.clear()
        await stream.send_all(frame(TEXT, b" " * (LARGE_BYTES + 1), first=0))
        for _ in range(3):
            await until(lambda: active_clients.has_others(()))
            active_clients._until.clear()
            await stream.send_all(frame(0, b" " * 1000, first=0))


async def test_who_waits_for_a_long_request_to_be_read_is_about(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = list[int]()

    async def run(*_: object) -> None:
        served.append(site.context.active_clients._served[NAME])
        await trio.sleep_forever()

    monkeypatch.setattr(FairThreadPool, "run", run)
    async with site.connected() as (_, client):
        await client.send(" " * 2 * LARGE_BYTES)
        await until(lambda: bool(served))
    assert served == [1]


async def test_client_that_may_run_jobs_by_now_is_told_that_its_message_was_dropped(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is valid: it would be wrong to say that it is no JSON."""
    refusals = list[bool]()

    def refuses_large(conversation: Conversation) -> bool:
        refusals.append(really(conversation))
        return refusals[-1]

    really = Conversation.refuses_large
    monkeypatch.setattr(Conversation, "refuses_large", refuses_large)
    authorization = site.context.authorization
    roles = authorization.roles
    request = b'{"jsonrpc":"2.0","id":1,"method":"service.hello"' + b" " * (2 * LARGE_BYTES) + b"}"
    async with site.connected() as (stream, client):
        await ask(client, "service.hello")
        viewing = evolve(roles.find("admin"), permissions=frozenset({Permission.VIEW}))
        authorization.roles = Roles({"admin": viewing})
        await stream.send_all(frame(TEXT, request[: LARGE_BYTES + 100], first=0))
        await until(lambda: bool(refusals))
        assert refusals == [True]
        authorization.roles = roles
        await stream.send_all(frame(0, request[LARGE_BYTES + 100 :]))
        reply = await client.receive()
        assert isinstance(reply, str)
        assert json.loads(reply) == {
            "jsonrpc": "2.0",
            "id": None,
            "error": {
                "code": 1002,
                "message": "cannot take a message of more than 32768 characters: the client's role "
                "did not allow it when the message began",
                "data": {"name": "permission_denied", "remedy": "send it again"},
            },
        }
