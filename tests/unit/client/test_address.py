"""Addresses as people write them."""

import re

import pytest

from jobworker.client.address import Address, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("worker1", "worker1", 50051),
        ("worker1.example.org:443", "worker1.example.org", 443),
        ("10.0.0.1:1", "10.0.0.1", 1),
        ("[::1]", "::1", 50051),
        ("[::1]:65535", "::1", 65535),
        ("fe80::1", "fe80::1", 50051),
        ("fe80::1%eth0", "fe80::1%eth0", 50051),
    ],
)
def test_host_and_port_are_told_apart(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "", ":50051", "a:", "a:0", "a:65536", "a:99999999", "a:-1", "a:٣", "a:http",
        "[::1", "[::1]50051", "[localhost]:1", ".a:1", "a b:1", "u@h:1", "h/x", "a\n:1",
        "a:1:2", "[a::g]:1", "::1\0", "\ud800::1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|port"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("::1:45819", "[::1]:45819"),
        ("2001:db8::1:50051", "[2001:db8::1]:50051"),
        ("https://worker1:1/x/", "worker1:1, without https://"),
        ("wss://worker1", "worker1, without wss://"),
        ("https://[::1]:1", "[::1]:1, without https://"),
    ],
)
def test_address_of_another_form_is_told_as_it_is_written_here(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"write {meant}")):
        parse_address(text)


def test_an_address_is_written_as_it_is_read() -> None:
    for text in ("worker1:50051", "[::1]:443"):
        assert str(parse_address(text)) == text


def test_server_name_has_no_zone() -> None:
    assert parse_address("[fe80::1%eth0]:1").server_name == "fe80::1"


@pytest.mark.parametrize("form", ["{}", "{}://x", "http://{}", "[{}", "{0}:{0}:1", "h:{}", " {}"])
def test_error_about_a_long_address_is_short(form: str) -> None:
    with pytest.raises(ValueError, match=r"too long: it has \d+ characters") as raised:
        parse_address(form.format("x" * 5_000_000))
    assert len(str(raised.value)) < 1000


def test_address_has_a_bound() -> None:
    with pytest.raises(ValueError, match="host") as raised:
        Address("x" * 5_000_000)
    assert len(str(raised.value)) < 1000
