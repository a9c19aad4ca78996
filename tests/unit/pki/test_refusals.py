"""What each side is told when a real handshake fails."""

import shutil
import socket
import ssl
from contextlib import suppress
from datetime import datetime, timedelta
from threading import Thread

import pytest

from jobworker import errors
from jobworker.pki import refusals

from .handshakes import LONG_AGO, NOW, Site, refused, talk


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


def test_server_of_another_authority_is_untrusted(site: Site, stranger: Site) -> None:
    result = talk(site.client(), stranger.server())
    told = refused(result)
    assert type(told) is errors.ServerUntrusted
    assert "not from this client's CA" in told.message
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
    assert type(told) is errors.NoService
    assert "does not speak TLS" in told.message


def test_server_that_hangs_up_is_a_failed_connection(site: Site) -> None:
    told = refusals.client_refusal(answer(site.client(), b""))
    assert type(told) is errors.ConnectionFailed
    assert "closed the connection" in told.message


@pytest.mark.parametrize(
    ("alert", "kind", "text"),
    [
        (40, errors.CertificateRefused, "no common TLS parameters"),
        (42, errors.CertificateRefused, "not valid yet, is too weak, or is damaged"),
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
        (b"", "closed the connection"),
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
