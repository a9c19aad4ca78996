"""Mutual TLS by real handshakes: what passes, what is refused, and what each side is told."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread

import pytest
from attrs import define
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker import errors
from jobworker.pki import identity, refusals, tls
from jobworker.pki.authority import Authority, Issued, init_authority

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
            ca=self.path("ca-cert"),
            certificate=self.path(f"{stem}-cert"),
            key=self.path(f"{stem}-key"),
            min_version="1.2" if settings.get("min_version") == "1.2" else "1.3",
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("stranger"))


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


# --- what passes ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "worker1.example.org"])
def test_both_ends_of_one_authority_talk_tls_13(site: Site, host: str) -> None:
    result = talk(site.client(), site.server(), host)
    assert (result.client_error, result.server_error) == (None, None)
    assert (result.reply, result.version) == (b"pong", "TLSv1.3")


def test_server_learns_who_the_client_is(site: Site) -> None:
    result = talk(site.client("admin-client"), site.server())
    issued = x509.load_pem_x509_certificate(site.path("admin-client-cert").read_bytes())
    who = identity.identity(result.peer)
    assert (who.common_name, who.role) == ("admin-client", "admin")
    assert int(who.serial, 16) == issued.serial_number
    assert who.not_after == issued.not_valid_after_utc


def test_tls_12_passes_where_it_is_allowed(site: Site) -> None:
    client = site.client()
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    result = talk(client, site.server(min_version="1.2"))
    assert (result.reply, result.version) == (b"pong", "TLSv1.2")


def test_server_hands_out_no_ticket_to_resume_by(site: Site) -> None:
    client, server = site.client(), site.server()
    first = talk(client, server)
    assert first.session is None or not first.session.has_ticket
    again = talk(client, server, session=first.session)
    assert again.session_resumed is False


def test_server_settings_forbid_compression_renegotiation_and_tickets(site: Site) -> None:
    context = site.server()
    wanted = ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    assert context.options & wanted == wanted
    assert context.num_tickets == 0
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.verify_flags & ssl.VERIFY_X509_STRICT


def test_both_ends_trust_nothing_but_the_given_authority(site: Site) -> None:
    for context in (site.server(), site.client()):
        assert len(context.get_ca_certs()) == 1


# --- the server refuses the client ----------------------------------------------------------


def test_client_without_certificate_is_told_so(site: Site) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(site.path("ca-cert"))
    result = talk(client, site.server())
    told = refused(result)
    assert type(told) is errors.CertificateRefused
    assert "asks for a client certificate and got none" in told.message
    assert result.server_error is not None
    assert refusals.explain_server_side(result.server_error) == "the client sent no certificate"


def test_client_of_another_authority_is_told_so(site: Site, stranger: Site) -> None:
    shutil.copy(site.path("ca-cert"), stranger.path("site-ca"))
    result = talk(stranger.client(ca="site-ca"), site.server())
    told = refused(result)
    assert type(told) is errors.CertificateRefused
    assert "not from the server's CA" in told.message
    assert result.server_error is not None
    explained = refusals.explain_server_side(result.server_error)
    assert "certificate was refused" in explained
    assert "local issuer" in explained


@pytest.mark.parametrize(
    ("issued_at", "told_client", "told_server"),
    [
        (LONG_AGO, "has expired", "certificate has expired"),
        (NOW + timedelta(days=2), "not valid yet", "not yet valid"),
    ],
)
def test_client_outside_its_validity_is_told_so(
    site: Site, issued_at: datetime, told_client: str, told_server: str
) -> None:
    stem = site.add("late", site.authority.issue_client("x", "viewer", now=issued_at, days=30))
    result = talk(site.client(stem), site.server())
    told = refused(result)
    assert type(told) is errors.CertificateRefused
    assert told_client in told.message
    assert "clocks" in told.remedy
    assert result.server_error is not None
    assert told_server in refusals.explain_server_side(result.server_error)


def test_server_certificate_does_not_serve_as_client(site: Site) -> None:
    told = refused(talk(site.client("server"), site.server()))
    assert type(told) is errors.CertificateRefused
    assert "not made for clients" in told.message


@pytest.mark.parametrize("stem", ["viewer-client", "missing"])
def test_tls_12_client_gets_nowhere_with_a_13_server(site: Site, stem: str) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(site.path("ca-cert"))
    if stem != "missing":
        client.load_cert_chain(site.path(f"{stem}-cert"), site.path(f"{stem}-key"))
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    result = talk(client, site.server())
    assert result.client_error is not None
    assert isinstance(refusals.client_refusal(result.client_error), errors.ConnectionFailed)
    assert result.server_error is not None
    assert "no TLS version that is allowed" in refusals.explain_server_side(result.server_error)


# --- the client refuses the server ----------------------------------------------------------


def test_server_under_another_name_is_untrusted(site: Site) -> None:
    result = talk(site.client(), site.server(), "worker2.example.org")
    told = refused(result)
    assert type(told) is errors.ServerUntrusted
    assert "another name" in told.message
    assert "worker2.example.org" in told.message
    assert "--host" in told.remedy


def test_server_under_another_address_is_untrusted(site: Site) -> None:
    told = refused(talk(site.client(), site.server(), "192.0.2.1"))
    assert type(told) is errors.ServerUntrusted
    assert "another name" in told.message
    assert "192.0.2.1" in told.message


def test_common_name_does_not_stand_in_for_a_host_name(site: Site) -> None:
    issued = issue(site, [(NameOID.COMMON_NAME, "localhost")], ExtendedKeyUsageOID.SERVER_AUTH)
    told = refused(talk(site.client(), site.lax_server(site.add("nameless", issued))))
    assert type(told) is errors.ServerUntrusted


def test_server_of_another_authority_is_untrusted(site: Site, stranger: Site) -> None:
    result = talk(site.client(), stranger.server())
    told = refused(result)
    assert type(told) is errors.ServerUntrusted
    assert "not from the CA" in told.message
    assert result.server_error is not None
    assert "unknown ca" in refusals.explain_server_side(result.server_error)


@pytest.mark.parametrize(
    ("issued_at", "reason"),
    [(LONG_AGO, "has expired"), (NOW + timedelta(days=2), "not valid yet")],
)
def test_server_outside_its_validity_is_untrusted(
    site: Site, issued_at: datetime, reason: str
) -> None:
    stem = site.add("old", site.authority.issue_server(["localhost"], now=issued_at, days=30))
    told = refused(talk(site.client(), site.lax_server(stem)))
    assert type(told) is errors.ServerUntrusted
    assert reason in told.message
    assert "clock" in told.remedy


def test_client_certificate_does_not_serve_as_server(site: Site) -> None:
    told = refused(talk(site.client(), site.lax_server("admin-client"), "localhost"))
    assert type(told) is errors.ServerUntrusted
    assert "not made for servers" in told.message


def test_tls_12_server_is_a_failed_connection(site: Site) -> None:
    server = site.lax_server("server")
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    told = refused(talk(site.client(), server))
    assert type(told) is errors.ConnectionFailed
    assert "does not offer TLS 1.3" in told.message


# --- no TLS at the other end ----------------------------------------------------------------


def answer(client: ssl.SSLContext, reply: bytes) -> ssl.SSLError:
    """What a client's handshake raises over a real socket whose peer says `reply` and ends."""
    near, far = socket.socketpair()

    def peer() -> None:
        # A client that closes with our bytes unread resets the connection: it is done then.
        with far, suppress(ConnectionResetError):
            far.sendall(reply)
            far.shutdown(socket.SHUT_WR)
            while far.recv(4096):
                pass

    thread = Thread(target=peer)
    thread.start()
    try:
        with near, pytest.raises(ssl.SSLError) as caught:
            client.wrap_socket(near, server_hostname="localhost")
    finally:
        thread.join()
    return caught.value


def test_server_without_tls_is_a_failed_connection(site: Site) -> None:
    told = refusals.client_refusal(answer(site.client(), b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    assert type(told) is errors.ConnectionFailed
    assert "does not speak TLS" in told.message


def test_server_that_hangs_up_is_a_failed_connection(site: Site) -> None:
    told = refusals.client_refusal(answer(site.client(), b""))
    assert type(told) is errors.ConnectionFailed
    assert "closed the connection" in told.message


@pytest.mark.parametrize(
    ("alert", "kind", "text"),
    [
        (40, errors.CertificateRefused, "no common terms"),
        (42, errors.CertificateRefused, "not valid yet, or is damaged"),
        (44, errors.CertificateRefused, "revoked"),
        (45, errors.CertificateRefused, "expired"),
        (46, errors.CertificateRefused, "did not pass"),
        (48, errors.CertificateRefused, "not from the server's CA"),
        (49, errors.CertificateRefused, "gives no access"),
        (70, errors.ConnectionFailed, "TLS 1.3"),
        (80, errors.ConnectionFailed, "internal error"),
        (116, errors.CertificateRefused, "got none"),
    ],
)
def test_alert_is_put_into_words(
    site: Site, alert: int, kind: type[errors.JobworkerError], text: str
) -> None:
    record = bytes([21, 3, 3, 0, 2, 2, alert])  # RFC 8446, section 6: a fatal alert, in the clear
    told = refusals.client_refusal(answer(site.client(), record))
    assert type(told) is kind
    assert text in told.message


@pytest.mark.parametrize(
    ("spoken", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "plain HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "did not speak TLS"),
        (b"", "went away"),
    ],
)
def test_log_says_what_was_no_handshake(site: Site, spoken: bytes, reason: str) -> None:
    incoming = ssl.MemoryBIO()
    far = site.server().wrap_bio(incoming, ssl.MemoryBIO(), server_side=True)
    incoming.write(spoken)
    incoming.write_eof()
    with pytest.raises(ssl.SSLError) as caught:
        far.do_handshake()
    assert reason in refusals.explain_server_side(caught.value)


def test_reason_unknown_to_python_is_found_in_the_text() -> None:
    error = ssl.SSLError(1, "[SSL] ssl/tls alert certificate revoked (_ssl.c:1006)")
    assert type(refusals.client_refusal(error)) is errors.CertificateRefused


# --- identity -------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ([(type_cn, "a")], "no OU"),
        ([(type_ou, "admin"), (type_ou, "viewer"), (type_cn, "a")], "2 OU"),
        ([(type_ou, "admin"), (type_ou, "admin"), (type_cn, "a")], "2 OU"),
        ([(type_ou, " admin"), (type_cn, "a")], "OU has white space"),
        ([(type_ou, "admin\n"), (type_cn, "a")], "OU has white space"),
        ([(type_ou, "ad\0min"), (type_cn, "a")], "OU holds unprintable"),
        ([(type_ou, "admin")], "no CN"),
        ([(type_ou, "admin"), (type_cn, "a"), (type_cn, "b")], "2 CN"),
        ([(type_ou, "admin"), (type_cn, "a\nb")], "CN holds unprintable"),
    ],
)
def test_subject_without_one_plain_role_and_name_is_denied(
    site: Site, subject: list[tuple[x509.ObjectIdentifier, str]], reason: str
) -> None:
    peer = peer_of(site, subject).peer
    with pytest.raises(errors.PermissionDenied, match=reason) as caught:
        identity.identity(peer)
    assert caught.value.remedy


def test_two_roles_in_one_relative_name_are_denied(site: Site) -> None:
    subject = x509.Name(
        [
            x509.RelativeDistinguishedName(
                [x509.NameAttribute(type_ou, "admin"), x509.NameAttribute(type_ou, "viewer")]
            ),
            x509.RelativeDistinguishedName([x509.NameAttribute(type_cn, "a")]),
        ]
    )
    with pytest.raises(errors.PermissionDenied, match="2 OU"):
        identity.identity(peer_of(site, subject).peer)


def test_role_hidden_behind_another_attribute_of_a_relative_name_counts(site: Site) -> None:
    subject = x509.Name(
        [
            x509.RelativeDistinguishedName([x509.NameAttribute(type_ou, "viewer")]),
            x509.RelativeDistinguishedName(
                [x509.NameAttribute(type_cn, "a"), x509.NameAttribute(type_ou, "admin")]
            ),
        ]
    )
    with pytest.raises(errors.PermissionDenied, match="2 OU"):
        identity.identity(peer_of(site, subject).peer)


@pytest.mark.parametrize("role", ["Admin", "ADMIN", "adm in", "administrator", "ａdmin"])  # noqa: RUF001
def test_role_is_taken_as_it_stands(site: Site, role: str) -> None:
    who = identity.identity(peer_of(site, [(type_ou, role), (type_cn, "a")]).peer)
    assert who.role == role


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_verified_certificate_is_denied(nothing: dict[str, object] | None) -> None:
    with pytest.raises(errors.PermissionDenied, match="no verified certificate"):
        identity.identity(nothing)


def test_empty_role_is_denied() -> None:
    subject = ((("organizationalUnitName", ""),), (("commonName", "a"),))
    with pytest.raises(errors.PermissionDenied, match="OU is empty"):
        identity.identity({"subject": subject})


# --- one's own files ------------------------------------------------------------------------

MAKERS = {"server": tls.server_context, "client": tls.client_context}


@define(eq=False)
class Files:
    """Paths of a context's three files, each a copy that a test may spoil."""

    ca: Path
    certificate: Path
    key: Path

    def make(self, side: str) -> ssl.SSLContext:
        return MAKERS[side](ca=self.ca, certificate=self.certificate, key=self.key)

    def fault(self, side: str, spoilt: Path) -> str:
        with pytest.raises(errors.CredentialsUnusable) as caught:
            self.make(side)
        told = caught.value
        assert str(spoilt) in told.message
        assert told.remedy
        assert "\n" not in str(told)
        return told.message


@pytest.fixture
def files(site: Site, tmp_path: Path, side: str) -> Files:
    stem = "server" if side == "server" else "viewer-client"
    copies = Files(tmp_path / "ca", tmp_path / "certificate", tmp_path / "key")
    shutil.copy(site.path("ca-cert"), copies.ca)
    shutil.copy(site.path(f"{stem}-cert"), copies.certificate)
    shutil.copy(site.path(f"{stem}-key"), copies.key)
    return copies


both_sides = pytest.mark.parametrize("side", ["server", "client"])
each_file = pytest.mark.parametrize("which", ["ca", "certificate", "key"])


@both_sides
def test_unspoilt_files_make_a_context(files: Files, side: str) -> None:
    assert isinstance(files.make(side), ssl.SSLContext)


@both_sides
@each_file
def test_missing_file_is_named(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    path.unlink()
    assert "no such file" in files.fault(side, path)


@both_sides
@each_file
def test_directory_in_place_of_file_is_named(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in files.fault(side, path)


@both_sides
@each_file
def test_pipe_in_place_of_file_does_not_hang(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in files.fault(side, path)


@both_sides
@each_file
@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x30\x82\x00\xff", b"\xff" * 2_000_000])
def test_file_that_is_not_pem_is_named(files: Files, side: str, which: str, content: bytes) -> None:
    path: Path = getattr(files, which)
    path.write_bytes(content)
    fault = files.fault(side, path)
    assert "no PEM block" in fault or "larger than" in fault


@both_sides
@each_file
def test_damaged_pem_is_named(files: Files, side: str, which: str) -> None:
    path: Path = getattr(files, which)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "MIIB", lines[-1], ""]))
    assert "damaged" in files.fault(side, path)


@both_sides
def test_swapped_files_are_named(files: Files, side: str) -> None:
    files.certificate, files.key = files.key, files.certificate
    assert "no PEM block 'CERTIFICATE'" in files.fault(side, files.certificate)


@both_sides
def test_encrypted_key_is_named_and_nobody_is_asked(files: Files, side: str) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    for form in (
        serialization.PrivateFormat.PKCS8,
        serialization.PrivateFormat.TraditionalOpenSSL,
    ):
        secret = serialization.BestAvailableEncryption(b"passphrase")
        files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))
        assert "is encrypted" in files.fault(side, files.key)


@both_sides
@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_key_of_another_certificate_is_named(files: Files, side: str, kind: str) -> None:
    key = (
        ec.generate_private_key(ec.SECP256R1())
        if kind == "ec"
        else rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    assert f"does not belong to {files.certificate}" in files.fault(side, files.key)


@both_sides
@each_file
def test_file_that_may_not_be_read_is_named(site: Site, side: str, which: str) -> None:
    stem = "server" if side == "server" else "viewer-client"
    # Not tmp_path: that lies below directories which only their owner may pass.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        files = Files(directory / "ca", directory / "certificate", directory / "key")
        for path, source in (
            (files.ca, "ca-cert"),
            (files.certificate, f"{stem}-cert"),
            (files.key, f"{stem}-key"),
        ):
            shutil.copy(site.path(source), path)
            path.chmod(0o644)
        files.make(side)  # all imports happen now, while everything may be read
        spoilt: Path = getattr(files, which)
        spoilt.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            fault = files.fault(side, spoilt)
        finally:
            os.seteuid(user)
        assert "may not read it" in fault


# --- a server's own certificate -------------------------------------------------------------


def server_fault(site: Site, stem: str) -> errors.CredentialsUnusable:
    with pytest.raises(errors.CredentialsUnusable) as caught:
        site.server(stem)
    assert "worker certs init" in caught.value.remedy
    return caught.value


def test_server_with_foreign_certificate_does_not_start(site: Site, stranger: Site) -> None:
    for what in ("cert", "key"):
        shutil.copy(stranger.path(f"server-{what}"), site.path(f"foreign-{what}"))
    told = server_fault(site, "foreign")
    assert f"{site.path('foreign-cert')}: it is not from the CA in" in told.message


@pytest.mark.parametrize(
    ("issued_at", "reason"),
    [(LONG_AGO, "it expired at 20"), (NOW + timedelta(days=2), "it is not valid before 20")],
)
def test_server_outside_its_validity_does_not_start(
    site: Site, issued_at: datetime, reason: str
) -> None:
    issued = site.authority.issue_server(["localhost"], now=issued_at, days=30)
    told = server_fault(site, site.add("untimely", issued))
    assert f"{site.path('untimely-cert')}: {reason}" in told.message


def test_server_of_expired_authority_does_not_start(tmp_path: Path) -> None:
    init_authority(tmp_path, [], now=LONG_AGO, days=30, ca_days=30)
    told = server_fault(Site(tmp_path, Authority.load(tmp_path)), "server")
    assert f"the CA certificate {tmp_path / 'ca-cert.pem'}: it expired at 20" in told.message


def test_server_with_client_certificate_does_not_start(site: Site) -> None:
    assert "not made for servers" in server_fault(site, "viewer-client").message


def test_server_without_host_name_does_not_start(site: Site) -> None:
    issued = issue(site, [(type_cn, "localhost")], ExtendedKeyUsageOID.SERVER_AUTH)
    assert "bears no host name" in server_fault(site, site.add("bare", issued)).message


# --- the mode of a key, and the cost of an import -------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o777])
def test_key_that_others_can_reach_is_warned_about(tmp_path: Path, mode: int) -> None:
    key = tmp_path / "key.pem"
    key.write_text("")
    key.chmod(mode)
    warning = tls.key_mode_warning(key)
    assert warning is not None
    assert f"{mode:04o}" in warning
    assert f"chmod 600 {key}" in warning


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_closed_key_gives_no_warning(tmp_path: Path, mode: int) -> None:
    key = tmp_path / "key.pem"
    key.write_text("")
    key.chmod(mode)
    assert tls.key_mode_warning(key) is None


def test_missing_key_gives_no_warning(tmp_path: Path) -> None:
    assert tls.key_mode_warning(tmp_path / "none") is None


def test_client_context_imports_no_openssl_bindings(site: Site) -> None:
    program = (
        "import sys; from pathlib import Path; from jobworker.pki import tls\n"
        "ca, certificate, key = map(Path, sys.argv[1:])\n"
        "tls.client_context(ca=ca, certificate=certificate, key=key)\n"
        "print(sorted({'OpenSSL', 'cryptography', 'trio', 'cffi'} & set(sys.modules)))"
    )
    paths = [site.path(f"{name}") for name in ("ca-cert", "viewer-client-cert")]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths, site.path("viewer-client-key")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
