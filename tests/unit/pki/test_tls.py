"""Mutual TLS by real handshakes: what passes, a key's mode, and the cost of an import."""

import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobworker import errors
from jobworker.pki import tls

from .handshakes import Site, issue, refused, talk


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "worker1.example.org"])
def test_both_ends_of_one_authority_talk_tls_13(site: Site, host: str) -> None:
    result = talk(site.client(), site.server(), host)
    assert (result.client_error, result.server_error) == (None, None)
    assert (result.reply, result.version) == (b"pong", "TLSv1.3")


def test_tls_12_passes_where_it_is_allowed(site: Site) -> None:
    client = site.client()
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    result = talk(client, site.server(min_version="1.2"))
    assert (result.reply, result.version) == (b"pong", "TLSv1.2")


def test_python_whose_openssl_cannot_be_reached_serves_by_one_curve(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(_: object) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", out_of_reach)
    server, other = site.server(), site.client()
    assert talk(site.client(), server).reply == b"pong"
    other.set_ecdh_curve("secp384r1")
    assert talk(other, server).client_error is not None


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


def test_common_name_does_not_stand_in_for_a_host_name(site: Site) -> None:
    issued = issue(site, [(NameOID.COMMON_NAME, "localhost")], ExtendedKeyUsageOID.SERVER_AUTH)
    told = refused(talk(site.client(), site.lax_server(site.add("nameless", issued))))
    assert type(told) is errors.ServerUntrusted


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


def test_client_side_imports_no_openssl_bindings(site: Site) -> None:
    program = (
        "import sys; from pathlib import Path; from jobworker.pki import refusals, tls\n"
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
