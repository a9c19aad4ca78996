"""Who is inside is judged anew by what a reload has brought."""

import ssl
import time
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import cast

import trio
from attrs import define, field
from cryptography.x509 import InvalidVersion

from jobworker.incidents import Incidents
from jobworker.model.access import Permission, Role, Roles, Scope
from jobworker.model.subjects import Subjects
from jobworker.pki.identity import Identity, identity
from jobworker.pki.revocation import Verifier
from jobworker.pki.served_hosts import ServedHosts
from jobworker.server.access.authorization import Authorization
from jobworker.server.access.connected_clients import (
    JUDGING_SECONDS_A_TURN,
    ConnectedClient,
    ConnectedClients,
    PeerCertificates,
    TlsState,
)

TLS = ssl.create_default_context()
UNREADABLE = (b"unreadable",)
END = datetime.now(UTC) + timedelta(days=1)


@define(eq=False)
class Turns(trio.abc.Instrument):
    """Counts the turns of the event loop."""

    now: int = 0

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - as trio calls it
        """See trio.abc.Instrument."""
        self.now += 1


@define
class Judge:
    """Takes all the time of a turn for each check, finds no fault, and counts the checks."""

    turns: Turns
    asked: Counter[int] = field(factory=Counter)

    def fault(self, _: object) -> None:
        """See Verifier."""
        self.asked[self.turns.now] += 1
        began = time.perf_counter()
        while time.perf_counter() < began + JUDGING_SECONDS_A_TURN:
            pass


class CannotRead:
    """Cannot read the certificates of one client, and finds the same fault with all others."""

    def fault(self, chain: tuple[bytes, ...]) -> str:
        """See Verifier."""
        if chain == UNREADABLE:
            raise InvalidVersion("1 is not a valid X509 version", 1)
        return "it has been revoked"


def tls_state(verifier: object = None) -> TlsState:
    verifier = cast(Verifier, verifier or Judge(Turns()))
    return TlsState(TLS, verifier, cast(ServedHosts, None), Subjects())


def role(name: str, *permissions: Permission, scope: Scope = Scope.ALL) -> Role:
    return Role(name=name, permissions=frozenset(permissions), scope=scope)


def own(name: str) -> dict[str, object]:
    """A certificate as Python tells it; its name and its role are one."""
    names = ((("commonName", name),), (("organizationalUnitName", name),))
    return {"subject": names, "serialNumber": "01", "notAfter": f"{END:%b %d %H:%M:%S %Y} GMT"}


def enter(
    stack: ExitStack, clients: ConnectedClients, name: str, chain: tuple[bytes, ...] = ()
) -> ConnectedClient:
    who: Identity = identity(own(name))
    certificates = PeerCertificates(own(name), chain)
    return stack.enter_context(clients.register(who, certificates, "peer", TLS))


async def test_role_that_may_do_less_has_to_come_again_and_no_other() -> None:
    view, log = Permission.VIEW, Permission.LOG
    before = Roles.with_own(
        role("deaf", view, log),
        role("narrow", view),
        role("wide", view, scope=Scope.OWN),
        role("same", view),
        role("gone", view),
    )
    after = Roles.with_own(
        role("deaf", view),
        role("narrow", view, scope=Scope.OWN),
        role("wide", view, log),
        role("same", view),
    )
    clients = ConnectedClients(tls_state(), Authorization(before, longest_seconds=60), Incidents())
    with ExitStack() as stack:
        inside = {n: enter(stack, clients, n) for n in ("deaf", "narrow", "wide", "same", "gone")}
        await clients.reauthorize(tls_state(), before)
        assert not any(client.reason for client in inside.values())
        await clients.reauthorize(tls_state(), after)
        told = {name: client.reason for name, client in inside.items() if client.reason}
        assert set(told) == {"deaf", "narrow", "gone"}
        assert told["deaf"] == "your role 'deaf' may do less than before; connect again"
        await clients.reauthorize(tls_state(), before)  # while those still say goodbye


async def test_loop_goes_on_between_checks_that_take_long() -> None:
    turns = Turns()
    roles = Roles.with_own(role("same", Permission.VIEW))
    clients = ConnectedClients(tls_state(), Authorization(roles, longest_seconds=60), Incidents())
    judge = Judge(turns)
    with ExitStack() as stack:
        for _ in range(20):
            enter(stack, clients, "same")
        trio.lowlevel.add_instrument(turns)
        await clients.reauthorize(tls_state(judge), roles)
        trio.lowlevel.remove_instrument(turns)
    assert judge.asked.total() == 20
    assert max(judge.asked.values()) == 1


async def test_client_that_cannot_be_checked_is_dismissed_and_so_is_each_one_that_is_revoked() -> (
    None
):
    roles, incidents = Roles.with_own(role("same", Permission.VIEW)), Incidents()
    clients = ConnectedClients(tls_state(), Authorization(roles, longest_seconds=60), incidents)
    with ExitStack() as stack:
        odd = enter(stack, clients, "same", UNREADABLE)
        others = [enter(stack, clients, "same") for _ in range(20)]
        await clients.reauthorize(tls_state(CannotRead()), roles)
        assert odd.reason.startswith("your certificate cannot be checked (incident ")
        assert all("it has been revoked" in client.reason for client in others)
    assert incidents.statistics() == {"reload": 1}
