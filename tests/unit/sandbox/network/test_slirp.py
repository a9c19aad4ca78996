"""The layout of a private network: never one that the host is in itself."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.sandbox.network.slirp import choose_layout, find_program, resolv_conf

from ...strategies import examples

addresses = st.ip_addresses(v=4).map(str)


@pytest.mark.parametrize(
    ("host", "prefix"),
    [
        ([], "10.0.2"),
        ([("127.0.0.1", 8), ("192.0.2.2", 24)], "10.0.2"),
        ([("10.0.2.15", 24)], "10.213.47"),
        ([("10.0.3.1", 23)], "10.213.47"),
        ([("10.0.2.200", 32)], "10.213.47"),
        ([("10.1.2.3", 8)], "172.29.101"),
        ([("10.1.2.3", 8), ("172.16.0.1", 12)], "10.0.2"),
    ],
)
def test_addresses_inside_are_not_the_hosts(host: list[tuple[str, int]], prefix: str) -> None:
    assert choose_layout(host).prefix == prefix


@examples(max_examples=100)
@given(st.lists(st.tuples(addresses, st.integers(0, 32)), max_size=5))
def test_every_address_of_the_host_is_refused_but_loopback(host: list[tuple[str, int]]) -> None:
    refused = choose_layout(host).host_addresses
    assert set(refused) == {address for address, _ in host if not address.startswith("127.")}
    assert len(set(refused)) == len(refused), "the kernel takes each route once"


def test_resolver_is_the_one_inside_and_search_domains_stay() -> None:
    host = "# made by hand\nnameserver 127.0.0.53\nsearch a.test b.test\noptions edns0\n"
    inside = resolv_conf(host, choose_layout([]))
    assert inside == "nameserver 10.0.2.3\nsearch a.test b.test\noptions edns0\n"
    assert resolv_conf("", choose_layout([])) == "nameserver 10.0.2.3\n"


def test_program_has_to_be_executable(tmp_path: Path) -> None:
    program = tmp_path / "usr" / "bin" / "slirp4netns"
    program.parent.mkdir(parents=True)
    whole, parts = {"": str(tmp_path)}, {"": "/nowhere", "/usr": str(tmp_path / "usr")}
    assert find_program(whole) is find_program(parts) is None
    program.touch(mode=0o644)
    program.chmod(0o755)
    assert find_program(whole) == find_program(parts) == "/usr/bin/slirp4netns"
