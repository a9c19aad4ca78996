"""The open connections of the service, and which of them end when the configuration changes.

The list of connected clients holds the TLS context with CA and revocation list, the table of roles,
and all open connections. `reauthorize` exchanges context and roles at once. Most connections go on.
A connection ends if its certificate or role is no longer valid, or if its role may do less than
before: the earlier role allowed what such a connection follows. Its client gets the reason, and the
connection ends within a second. A connection also ends when its certificate expires.

A handshake that began before a change and ended after it was checked with the old context. So
`register` checks a new connection once more if its context is not the current one.
"""

import logging
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

import trio
from attrs import define, field, frozen

from jobworker.config.settings import SecuritySettings
from jobworker.errors import CertificateRefused, PermissionDenied
from jobworker.incidents import Incidents
from jobworker.model.access import Roles
from jobworker.model.subjects import Subjects
from jobworker.pki.identity import Identity, identity
from jobworker.pki.revocation import Verifier
from jobworker.pki.served_hosts import ServedHosts
from jobworker.pki.server_files import ServerFiles
from jobworker.pki.tls import server_context
from jobworker.server.access.authorization import Authorization

log = logging.getLogger("jobworker.server")

LONGEST_WAIT_SECONDS = 3600.0
"""How often the time of day is read again, since the clock may be set."""

JUDGING_SECONDS_A_TURN = 0.002
"""How long one turn of the event loop checks connections after a reload. There may be a thousand of
them. One check takes 0.2 ms, and 0.8 ms with a revocation list of 18,500 entries, since OpenSSL
verifies its signature each time."""


@frozen
class TlsState:
    """The certificates, hosts and subjects by which the list of connected clients checks
    connections."""

    tls: ssl.SSLContext
    verifier: Verifier
    hosts: ServedHosts
    subjects: Subjects

    @classmethod
    def of(cls, files: ServerFiles, security: SecuritySettings) -> "TlsState":
        """Make them from the files and settings. Raises CredentialsUnusable."""
        context = server_context(files, min_version=security.min_tls_version)
        hosts = ServedHosts.of(files.certificate.content)
        subjects = Subjects(security.subjects, security.roles_from_ou)
        return cls(context, Verifier.of(files, datetime.now(UTC)), hosts, subjects)


@frozen
class PeerCertificates:
    """The certificates that a client has presented."""

    own: Mapping[str, object]
    """Its own certificate, as `ssl.SSLObject.getpeercert` returns it."""
    chain: tuple[bytes, ...]
    """Those in DER that its check needed, its own first. A client may send others with them; these
    would take memory, and time at each reload."""


@define(eq=False)
class ConnectedClient:
    """An open connection, with the identity of its client."""

    identity: Identity
    certificates: PeerCertificates = field(repr=False)
    peer: str
    leaving: trio.Event = field(factory=trio.Event)
    """Set when the connection has to end."""
    reason: str = ""
    """What is wrong with the certificate or role; empty if the service ends."""

    def dismiss(self, reason: str) -> None:
        """Ask the conversation to end the connection; the client gets the reason."""
        if not self.reason:
            self.reason = reason
            log.info(
                "%s: ended: %s (%s): %s",
                self.peer,
                self.identity.common_name,
                self.identity.serial,
                reason,
            )
            self.leaving.set()

    async def leave_at_expiry(self) -> None:
        """Dismiss the connection when its certificate expires; never returns."""
        while True:
            left = (self.identity.not_after - datetime.now(UTC)).total_seconds()
            if left <= 0:
                self.dismiss("your certificate has expired")
            await trio.sleep(min(max(left, 1.0), LONGEST_WAIT_SECONDS))


@define(eq=False)
class ConnectedClients:
    """The open connections of one service.

    Also the TLS state and the authorization by which the service checks them.
    """

    tls_state: TlsState
    authorization: Authorization
    _incidents: Incidents
    _inside: set[ConnectedClient] = field(factory=set)
    _closed: bool = False

    @contextmanager
    def register(
        self,
        who: Identity,
        certificates: PeerCertificates,
        peer: str,
        judged_by: ssl.SSLContext,
    ) -> Iterator[ConnectedClient]:
        """Count a connection as open while the block lasts.

        `judged_by` is the TLS context of its handshake. If that is not the current one, the list of
        connected clients checks the client's certificates again. Raises CertificateRefused.
        """
        client = ConnectedClient(who, certificates, peer)
        if judged_by is not self.tls_state.tls and (fault := self._fault(client)):
            raise CertificateRefused(f"cannot serve this certificate: {fault}")
        self._inside.add(client)
        if self._closed:
            client.leaving.set()
        try:
            yield client
        finally:
            self._inside.discard(client)

    async def reauthorize(self, tls_state: TlsState, roles: Roles) -> None:
        """Use these from now on, and check all open connections, a few in a turn of the loop.

        Raises nothing after the exchange, so each connection is checked: a check that fails by an
        exception ends its own connection.
        """
        before = self.authorization.roles
        self.tls_state, self.authorization.roles = tls_state, roles
        end = 0.0
        for client in tuple(self._inside):
            if time.perf_counter() >= end:
                await trio.lowlevel.checkpoint()
                end = time.perf_counter() + JUDGING_SECONDS_A_TURN
            if client not in self._inside:  # it has left meanwhile
                continue
            if fault := self._fault_or_incident(client, before):
                client.dismiss(fault)

    def close(self) -> None:
        """Ask all connections to end, since the service ends; also those that open from now on."""
        self._closed = True
        for client in self._inside:
            client.leaving.set()

    def _fault_or_incident(self, client: ConnectedClient, before: Roles) -> str | None:
        try:
            return self._fault(client) or self._loss(client, before)
        except Exception:  # noqa: BLE001 - recorded
            number = self._incidents.record("reload", f"the check of the client at {client.peer}")
            return f"your certificate cannot be checked (incident {number})"

    def _fault(self, client: ConnectedClient) -> str | None:
        if fault := self.tls_state.verifier.fault(client.certificates.chain):
            return f"your certificate is no longer valid: {fault}"
        try:
            now = identity(client.certificates.own, self.tls_state.subjects)
            self.authorization.roles.find(now.role)
        except PermissionDenied as denied:
            return denied.message
        if now != client.identity:
            return f"you are {now.common_name} of the role {now.role} now; connect again"
        return None

    def _loss(self, client: ConnectedClient, before: Roles) -> str | None:
        """The reason if a client's role may do less than before; else None.

        The table must still have the role.
        """
        role = client.identity.role
        if client.reason or before.find(role).is_within(self.authorization.roles.find(role)):
            return None
        return f"your role {role!r} may do less than before; connect again"
