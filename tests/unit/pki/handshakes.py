"""Handshakes in memory between the two contexts, and certificates of any subject for them."""

import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from attrs import define
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker import errors
from jobworker.pki import refusals, tls
from jobworker.pki.administration import init_authority
from jobworker.pki.authority import Authority, Issued
from jobworker.pki.server_files import ServerFiles

NOW = datetime.now(UTC)  # handshakes go by the system's clock


LONG_AGO = NOW - timedelta(days=400)


@define(eq=False)
class Site:
    """A directory with an authority's full set, and room for certificates beside it."""

    directory: Path
    authority: Authority

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def add(self, stem: str, issued: Issued) -> str:
        for name, (content, _) in issued.files(stem).items():
            (self.directory / name).write_bytes(content)
        return stem

    def server(self, stem: str = "server", **settings: str) -> ssl.SSLContext:
        return tls.server_context(
            self.files(stem),
            min_version="1.2" if settings.get("min_version") == "1.2" else "1.3",
        )

    def files(self, stem: str = "server") -> ServerFiles:
        return ServerFiles.read(
            ca=self.path("ca-cert"),
            certificate=self.path(f"{stem}-cert"),
            key=self.path(f"{stem}-key"),
            crl=self.path("ca-crl"),
        )

    def client(self, stem: str = "viewer-client", ca: str = "ca-cert") -> ssl.SSLContext:
        return tls.client_context(
            ca=self.path(ca),
            certificate=self.path(f"{stem}-cert"),
            key=self.path(f"{stem}-key"),
        )

    def lax_server(self, stem: str) -> ssl.SSLContext:
        """A server that does not look at its own certificate, as a rival's would not."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path(f"{stem}-cert"), self.path(f"{stem}-key"))
        return context


def make_site(directory: Path) -> Site:
    """An authority that began long ago, so that it can have issued what has expired since."""
    init_authority(directory, ["worker1.example.org"], now=LONG_AGO, days=4000, ca_days=4000)
    return Site(directory, Authority.load(directory))


@define(eq=False)
class Talk:
    """What came of a handshake and the first exchange after it, on both sides."""

    client_error: ssl.SSLError | None = None
    server_error: ssl.SSLError | None = None
    reply: bytes = b""
    version: str | None = None
    peer: dict[str, object] | None = None
    session_resumed: bool | None = None
    session: ssl.SSLSession | None = None


def talk(
    client: ssl.SSLContext,
    server: ssl.SSLContext,
    host: str = "localhost",
    session: ssl.SSLSession | None = None,
) -> Talk:
    """Handshake in memory, send "ping", answer "pong"; deterministic, no thread and no socket."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host, session=session)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    result = Talk()

    def near_side() -> Iterator[None]:
        yield from _until_done(near.do_handshake)
        near.write(b"ping")
        yield from _until_done(lambda: setattr(result, "reply", near.read(10)))
        result.session = near.session

    def far_side() -> Iterator[None]:
        yield from _until_done(far.do_handshake)
        result.peer = dict(far.getpeercert() or {})
        result.session_resumed = far.session_reused
        yield from _until_done(lambda: far.read(10))
        far.write(b"pong")

    sides = {"client_error": near_side(), "server_error": far_side()}
    for _ in range(20):  # a handshake has at most four flights
        for name, side in list(sides.items()):
            try:
                next(side, None)
            except ssl.SSLError as exc:
                setattr(result, name, exc)
                del sides[name]
    result.version = near.version()
    return result


def _until_done(step: Callable[[], object]) -> Iterator[None]:
    while True:
        try:
            step()
        except ssl.SSLWantReadError:
            yield
        else:
            return


def refused(result: Talk) -> errors.JobworkerError:
    """What the client's user is told."""
    assert result.client_error is not None
    assert result.reply == b""
    told = refusals.client_refusal(result.client_error)
    assert told.remedy
    assert "\n" not in str(told)
    return told


type_ou, type_cn = NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME


def issue(
    site: Site,
    subject: list[tuple[x509.ObjectIdentifier, str]] | x509.Name,
    purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
) -> Issued:
    """A certificate with a subject that `Authority` would not put its name to."""
    if not isinstance(subject, x509.Name):
        subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    key = ec.generate_private_key(ec.SECP256R1())
    root = site.authority.root
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())
    builder = (
        x509.CertificateBuilder(root.certificate.subject, subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(hours=1))
        .not_valid_after(NOW + timedelta(hours=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    return Issued(certificate=builder.sign(root.key, hashes.SHA256()), key=key)


def peer_of(site: Site, subject: list[tuple[x509.ObjectIdentifier, str]] | x509.Name) -> Talk:
    return talk(site.client(site.add("odd", issue(site, subject))), site.server())
