"""Who a peer is, by certificates that a real handshake brought over."""

import pytest
from cryptography import x509

from jobworker import errors
from jobworker.pki import identity

from .handshakes import Site, peer_of, talk, type_cn, type_ou


def test_server_learns_who_the_client_is(site: Site) -> None:
    result = talk(site.client("admin-client"), site.server())
    issued = x509.load_pem_x509_certificate(site.path("admin-client-cert").read_bytes())
    who = identity.identity(result.peer)
    assert (who.common_name, who.role) == ("admin-client", "admin")
    assert int(who.serial, 16) == issued.serial_number
    assert who.not_after == issued.not_valid_after_utc


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        ([(type_cn, "a")], "no OU"),
        ([(type_ou, "admin"), (type_ou, "viewer"), (type_cn, "a")], "2 OU"),
        ([(type_ou, "admin"), (type_ou, "admin"), (type_cn, "a")], "2 OU"),
        ([(type_ou, " admin"), (type_cn, "a")], "OU has white space"),
        ([(type_ou, "admin\n"), (type_cn, "a")], "OU has white space"),
        ([(type_ou, "ad\0min"), (type_cn, "a")], "OU contains unprintable"),
        ([(type_ou, "admin")], "no CN"),
        ([(type_ou, "admin"), (type_cn, "a"), (type_cn, "b")], "2 CN"),
        ([(type_ou, "admin"), (type_cn, "a\nb")], "CN contains unprintable"),
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
