"""The certificate authority: what it issues, and what it takes back from disk."""

import ipaddress
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import crypto

from jobworker import errors
from jobworker.pki import authority, host_names
from jobworker.pki.administration import init_authority, issue_client
from jobworker.pki.authority import Authority

from .certificates import CERTIFICATES, FILES, NOW, read, verify_strictly


def names(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> list[str]:
    return [str(a.value) for a in certificate.subject.get_attributes_for_oid(oid)]


@pytest.mark.parametrize("stem", CERTIFICATES)
def test_every_certificate_passes_openssl_strict_checks(made: Path, stem: str) -> None:
    verify_strictly(read(made, stem), read(made, "ca"), NOW)


def test_verification_used_here_fails_for_another_authority(made: Path) -> None:
    other = Authority.create(now=NOW).root.certificate
    with pytest.raises(crypto.X509StoreContextError):
        verify_strictly(read(made, "server"), other, NOW)


def test_ca_can_sign_leaves_only(made: Path) -> None:
    extensions = read(made, "ca").extensions
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (
        True,
        True,
        0,
    )
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature


def test_server_certificate_is_for_servers_and_has_no_role(made: Path) -> None:
    server = read(made, "server")
    extended = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert names(server, NameOID.ORGANIZATIONAL_UNIT_NAME) == []


@pytest.mark.parametrize("role", ["admin", "viewer"])
def test_client_certificate_is_for_clients_and_bears_its_role(made: Path, role: str) -> None:
    client = read(made, f"{role}-client")
    extended = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert names(client, NameOID.ORGANIZATIONAL_UNIT_NAME) == [role]
    assert names(client, NameOID.COMMON_NAME) == [f"{role}-client"]
    assert names(client, NameOID.ORGANIZATION_NAME) == ["jobworker"]


def test_server_certificate_bears_loopback_and_given_hosts(made: Path) -> None:
    san = read(made, "server").extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert san.value.get_values_for_type(x509.DNSName) == ["localhost", "worker1.example.org"]
    assert san.value.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(text) for text in ("127.0.0.1", "::1", "192.0.2.7")
    ]


@pytest.mark.parametrize("stem", CERTIFICATES)
def test_keys_are_p256_and_belong_to_their_certificates(made: Path, stem: str) -> None:
    public = read(made, stem).public_key()
    key = crypto.load_privatekey(
        crypto.FILETYPE_PEM, (made / f"{stem}-key.pem").read_bytes()
    ).to_cryptography_key()
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert key.public_key() == public


def test_serials_are_long_and_differ(made: Path) -> None:
    serials = {read(made, stem).serial_number for stem in CERTIFICATES}
    assert len(serials) == len(CERTIFICATES)
    assert all(serial.bit_length() > 64 for serial in serials)


def test_validity_counts_from_now_with_room_for_slow_clocks(made: Path) -> None:
    for stem, days in (("ca", 3650), ("server", 365), ("viewer-client", 365)):
        certificate = read(made, stem)
        assert certificate.not_valid_before_utc == NOW - authority.CLOCK_SKEW
        assert certificate.not_valid_after_utc == NOW + timedelta(days=days)


def test_nothing_outlives_its_authority() -> None:
    root = Authority.create(now=NOW, days=10)
    leaf = root.issue_client("a", "viewer", now=NOW, days=365).certificate
    assert leaf.not_valid_after_utc == root.root.certificate.not_valid_after_utc


def test_expired_authority_issues_nothing() -> None:
    root = Authority.create(now=NOW, days=1)
    with pytest.raises(errors.CredentialsUnusable, match="the CA expired"):
        root.issue_client("a", "viewer", now=NOW + timedelta(days=1))


@pytest.mark.parametrize("days", [0, -1, authority.DAYS_MAX + 1])
def test_senseless_validity_is_refused(days: int) -> None:
    with pytest.raises(errors.InvalidParams, match=str(days)):
        Authority.create(now=NOW, days=days)


def test_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        Authority.create(now=NOW.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("host", "borne"),
    [
        ("LOCALHOST", "localhost"),
        ("Bücher.Example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "xn--bcher-kva.example"),
        ("build-01", "build-01"),
        ("2001:DB8:0::1", "2001:db8::1"),
    ],
)
def test_hosts_are_taken_in_their_canonical_form(host: str, borne: str) -> None:
    assert str(host_names.general_name(host).value) == borne


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "*.example.org",
        "a*.example.org",
        "example.org.",
        "exa mple.org",
        "example.org\n",
        "under_score.example.org",
        "-leading.example.org",
        "trailing-.example.org",
        "a..b",
        "host:50051",
        "[::1]",
        "https://example.org",
        "192.0.2.256",
        "192.0.2",
        "192.0.2.0/24",
        "fe80::1%eth0",
        "straße.example",
        "\uff45xample.org",
        "x" * 64,
        ".".join(["x" * 60] * 5),
        "ü" * 100_000,
        "a\0.example.org",
    ],
)
def test_what_no_certificate_should_bear_is_refused(host: str) -> None:
    with pytest.raises(errors.InvalidParams, match="cannot use the host") as caught:
        host_names.general_name(host)
    assert caught.value.remedy
    assert len(str(caught.value)) < 500


def test_wildcard_is_refused_by_its_name() -> None:
    with pytest.raises(errors.InvalidParams, match="wildcards are not issued"):
        host_names.general_name("*.example.org")


def test_repeated_hosts_stand_once() -> None:
    issued = Authority.create(now=NOW).issue_server(["a.example", "A.example"], now=NOW)
    san = issued.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert list(san.value) == [x509.DNSName("a.example")]


def test_server_without_host_is_refused() -> None:
    with pytest.raises(errors.InvalidParams, match="no host"):
        Authority.create(now=NOW).issue_server([], now=NOW)


@pytest.mark.parametrize("bad", ["", " a", "a ", "a\nb", "a\0b", "\u202eadmin", "x" * 65])
def test_names_that_identity_would_refuse_are_not_issued(bad: str) -> None:
    root = Authority.create(now=NOW)
    with pytest.raises(errors.InvalidParams, match="the name"):
        root.issue_client(bad, "viewer", now=NOW)
    with pytest.raises(errors.InvalidParams, match="the role"):
        root.issue_client("name", bad, now=NOW)


def test_loaded_authority_issues_what_its_old_self_would(made: Path) -> None:
    loaded = Authority.load(made)
    issued = loaded.issue_client("build robot", "viewer", now=NOW)
    verify_strictly(issued.certificate, read(made, "ca"), NOW)


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("ca-cert.pem", None, "no such file"),
        ("ca-key.pem", None, "no such file"),
        ("ca-cert.pem", "server-cert.pem", "not a CA certificate"),
        ("ca-cert.pem", "ca-key.pem", "no PEM block 'CERTIFICATE'"),
        ("ca-key.pem", "server-key.pem", "does not belong to"),
    ],
)
def test_unusable_authority_names_file_and_reason(
    made: Path, tmp_path: Path, name: str, source: str | None, reason: str
) -> None:
    for file in ("ca-cert.pem", "ca-key.pem"):
        if file != name:
            (tmp_path / file).write_bytes((made / file).read_bytes())
    if source:
        (tmp_path / name).write_bytes((made / source).read_bytes())
    with pytest.raises(errors.CredentialsUnusable, match=reason) as caught:
        Authority.load(tmp_path)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["ca-cert.pem", "ca-key.pem"])
def test_damaged_authority_names_file(made: Path, tmp_path: Path, name: str) -> None:
    for file in ("ca-cert.pem", "ca-key.pem"):
        (tmp_path / file).write_bytes((made / file).read_bytes())
    lines = (made / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join([lines[0], "MIIB", lines[-1], ""]))
    with pytest.raises(errors.CredentialsUnusable, match="damaged") as caught:
        Authority.load(tmp_path)
    assert str(tmp_path / name) in caught.value.message


def test_summary_tells_what_was_made(tmp_path: Path) -> None:
    summary = init_authority(tmp_path / "c", ["192.0.2.7"], now=NOW, days=30)
    assert sorted(path.name for path in summary.files) == FILES
    assert all(path.parent == tmp_path / "c" for path in summary.files)
    assert summary.hosts == ("localhost", "127.0.0.1", "::1", "192.0.2.7")
    assert summary.not_after == NOW + timedelta(days=30)
    assert summary.ca_not_after == NOW + timedelta(days=3650)


def test_bad_host_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidParams):
        init_authority(tmp_path / "certs", ["*.example.org"], now=NOW)
    assert not (tmp_path / "certs").exists()


def test_private_keys_do_not_show_in_representations() -> None:
    root = Authority.create(now=NOW)
    assert "key" not in repr(root)


def test_names_that_look_alike_in_ascii_have_files_of_their_own(tmp_path: Path) -> None:
    init_authority(tmp_path, [], now=NOW)
    authority = Authority.load(tmp_path)
    made = [
        issue_client(tmp_path, authority, name=name, role="viewer", now=NOW)
        for name in ("ä", "ö", "a b", "a_b", "server", "alice")
    ]
    assert len({each.entry.stem for each in made}) == len(made)
    assert made[-1].entry.stem == "alice"
