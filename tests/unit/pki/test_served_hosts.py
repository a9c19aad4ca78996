"""Which hosts a browser may have dialled."""

import pytest

from jobworker.pki.served_hosts import ServedHosts

HOSTS = ServedHosts(frozenset({"worker.example.org", "*.jobs.example.org", "127.0.0.1", "::1"}))


@pytest.mark.parametrize(
    ("host", "held"),
    [
        ("worker.example.org", True),
        ("Worker.Example.ORG:50051", True),
        ("a.jobs.example.org", True),
        ("a.b.jobs.example.org", False),
        ("jobs.example.org", False),
        ("127.0.0.1:50051", True),
        ("[::1]:50051", True),
        ("[::1]", True),
        ("[::2]", False),
        ("evil.example", False),
        ("worker.example.org.evil.example", False),
        ("", False),
        (":50051", False),
    ],
)
def test_host_is_one_that_the_certificate_bears(host: str, held: bool) -> None:
    assert HOSTS.hold(host) is held
