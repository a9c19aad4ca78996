"""The door: who may come in, and who has to leave when that changes.

It holds what a handshake goes by (the TLS context with CA and revocation list), the table of roles
and everyone who is inside. `refit` exchanges all of it at once: connections go on, but for those
whose certificate or role is not good any more, or whose role may do less: what such a connection
follows was allowed by the role of before. They are told why and are out within a second. A
certificate that comes to its end ends its connections too.

A handshake that began before a change and ended after it was judged by the old context, so everyone
who comes in is judged once more where the context is not the one of now.
"""

import logging
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

import trio
from attrs import define, field, frozen

from jobworker.config.settings import SecuritySettings
from jobworker.errors import CertificateRefused, PermissionDenied
from jobworker.model.access import Roles
from jobworker.model.subjects import Subjects
from jobworker.pki.identity import Identity, identity
from jobworker.pki.material import ServerFiles
from jobworker.pki.revocation import Verifier
from jobworker.pki.served_hosts import ServedHosts
from jobworker.pki.tls import server_context
from jobworker.server.gate import Gate

log = logging.getLogger("jobworker.server")

LONGEST_WAIT_SECONDS = 3600.0
"""How often the clock on the wall is looked at: it may be set."""

JUDGED_A_TURN = 10
"""Connections, after a reload: a verification takes 0.2 ms, and there may be a thousand."""


@frozen
class Fittings:
    """What handshakes and open connections are judged by."""

    tls: ssl.SSLContext
    verifier: Verifier
    hosts: ServedHosts
    subjects: Subjects

    @classmethod
    def of(cls, files: ServerFiles, security: SecuritySettings) -> "Fittings":
        """Made of the files. Raises CredentialsUnusable."""
        context = server_context(files, min_version=security.min_tls_version)
        hosts = ServedHosts.of(files.certificate.content)
        subjects = Subjects(security.subjects, security.roles_from_ou)
        return cls(context, Verifier.of(files, datetime.now(UTC)), hosts, subjects)


@frozen
class PeerCertificates:
    """What a client has presented."""

    own: Mapping[str, object]
    """Its own certificate, as `ssl.SSLObject.getpeercert` tells it."""
    chain: tuple[bytes, ...]
    """All of them in DER, its own first."""


@define(eq=False)
class Visitor:
    """An open connection."""

    identity: Identity
    certificates: PeerCertificates = field(repr=False)
    peer: str
    leaving: trio.Event = field(factory=trio.Event)
    """Set when it has to go."""
    reason: str = ""
    """What is wrong with its certificate or role; empty where the service ends."""

    def dismiss(self, reason: str) -> None:
        """Have the connection ended."""
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
        """Wait for the certificate's end; never returns before the connection ends."""
        while True:
            left = (self.identity.not_after - datetime.now(UTC)).total_seconds()
            if left <= 0:
                self.dismiss("your certificate has expired")
            await trio.sleep(min(max(left, 1.0), LONGEST_WAIT_SECONDS))


@define(eq=False)
class Door:
    """Of one service."""

    fittings: Fittings
    gate: Gate
    _inside: set[Visitor] = field(factory=set)
    _closed: bool = False

    @contextmanager
    def visit(
        self,
        who: Identity,
        certificates: PeerCertificates,
        peer: str,
        judged_by: ssl.SSLContext,
    ) -> Iterator[Visitor]:
        """Count a connection as inside while the block lasts. Raises CertificateRefused."""
        visitor = Visitor(who, certificates, peer)
        if judged_by is not self.fittings.tls and (fault := self._fault(visitor)):
            raise CertificateRefused(f"cannot serve this certificate: {fault}")
        self._inside.add(visitor)
        if self._closed:
            visitor.leaving.set()
        try:
            yield visitor
        finally:
            self._inside.discard(visitor)

    async def refit(self, fittings: Fittings, roles: Roles) -> None:
        """Judge by these from now on, and those who are inside, a few in a turn of the loop."""
        before = self.gate.roles
        self.fittings, self.gate.roles = fittings, roles
        for count, visitor in enumerate(tuple(self._inside)):
            if count % JUDGED_A_TURN == 0:
                await trio.lowlevel.checkpoint()
            if visitor not in self._inside:  # it has left meanwhile
                continue
            if fault := self._fault(visitor) or self._loss(visitor, before):
                visitor.dismiss(fault)

    def close(self) -> None:
        """Have everyone leave, because the service ends: those too who come in from now on."""
        self._closed = True
        for visitor in self._inside:
            visitor.leaving.set()

    def _fault(self, visitor: Visitor) -> str | None:
        if fault := self.fittings.verifier.fault(visitor.certificates.chain):
            return f"your certificate is not good any more: {fault}"
        try:
            now = identity(visitor.certificates.own, self.fittings.subjects)
            self.gate.roles.find(now.role)
        except PermissionDenied as denied:
            return denied.message
        if now != visitor.identity:
            return f"you are {now.common_name} of the role {now.role} now; connect again"
        return None

    def _loss(self, visitor: Visitor, before: Roles) -> str | None:
        """What a visitor is told whose role, which the table still has, may do less than before."""
        role = visitor.identity.role
        if visitor.reason or before.find(role).is_within(self.gate.roles.find(role)):
            return None
        return f"your role {role!r} may do less than before; connect again"
