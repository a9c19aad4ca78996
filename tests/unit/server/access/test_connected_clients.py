"""Who is inside is judged anew by what a reload has brought."""

import ssl
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import cast

import trio
from attrs import define, field

from jobworker.model.access import Permission, Role, Roles, Scope
from jobworker.model.subjects import Subjects
from jobworker.pki.identity import Identity, identity
from jobworker.pki.revocation import Verifier
from jobworker.pki.served_hosts import ServedHosts
from jobworker.server.access.authorization import Authorization
from jobworker.server.access.connected_clients import (
    JUDGED_A_TURN,
    ConnectedClient,
    ConnectedClients,
    PeerCertificates,
    TlsState,
)

TLS = ssl.create_default_context()
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
    """Finds no fault, and counts what it is asked in each turn."""

    turns: Turns
    asked: Counter[int] = field(factory=Counter)

    def fault(self, _: object) -> None:
        """See Verifier."""
        self.asked[self.turns.now] += 1


def tls_state(turns: Turns | None = None) -> TlsState:
    verifier = cast(Verifier, Judge(turns or Turns()))
    return TlsState(TLS, verifier, cast(ServedHosts, None), Subjects())


def role(name: str, *permissions: Permission, scope: Scope = Scope.ALL) -> Role:
    return Role(name=name, permissions=frozenset(permissions), scope=scope)


def own(name: str) -> dict[str, object]:
    """A certificate as Python tells it; its name and its role are one."""
    names = ((("commonName", name),), (("organizationalUnitName", name),))
    return {"subject": names, "serialNumber": "01", "notAfter": f"{END:%b %d %H:%M:%S %Y} GMT"}


def enter(stack: ExitStack, clients: ConnectedClients, name: str) -> ConnectedClient:
    who: Identity = identity(own(name))
    certificates = PeerCertificates(own(name), ())
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
    clients = ConnectedClients(tls_state(), Authorization(before, longest_seconds=60))
    with ExitStack() as stack:
        inside = {n: enter(stack, clients, n) for n in ("deaf", "narrow", "wide", "same", "gone")}
        await clients.reauthorize(tls_state(), before)
        assert not any(client.reason for client in inside.values())
        await clients.reauthorize(tls_state(), after)
        told = {name: client.reason for name, client in inside.items() if client.reason}
        assert set(told) == {"deaf", "narrow", "gone"}
        assert told["deaf"] == "your role 'deaf' may do less than before; connect again"
        await clients.reauthorize(tls_state(), before)  # while those still say goodbye


async def test_many_are_judged_a_few_in_a_turn_of_the_loop() -> None:
    turns = Turns()
    roles = Roles.with_own(role("same", Permission.VIEW))
    clients = ConnectedClients(tls_state(), Authorization(roles, longest_seconds=60))
    new = tls_state(turns)
    judge = cast(Judge, new.verifier)
    with ExitStack() as stack:
        for _ in range(5 * JUDGED_A_TURN):
            enter(stack, clients, "same")
        trio.lowlevel.add_instrument(turns)
        await clients.reauthorize(new, roles)
        trio.lowlevel.remove_instrument(turns)
    assert judge.asked.total() == 5 * JUDGED_A_TURN
    assert max(judge.asked.values()) == JUDGED_A_TURN
