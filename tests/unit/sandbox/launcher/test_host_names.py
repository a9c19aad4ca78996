"""The host name that a next start is likely to ask for."""

import pytest

from jobworker.sandbox.launcher.host_names import following
from jobworker.sandbox.protocol.requests import MAX_HOSTNAME_BYTES


@pytest.mark.parametrize(
    ("name", "next_name"),
    [
        ("job-9", "job-10"),
        ("7", "8"),
        ("a1-2", "a1-3"),
        ("job", ""),
        ("", ""),
        ("job-٣", ""),  # only ASCII digits: the name shall be one that a start asks for
        ("x" * (MAX_HOSTNAME_BYTES - 1) + "9", ""),
        ("ü" * 30 + "999", ""),
    ],
)
def test_number_at_the_end_is_one_higher(name: str, next_name: str) -> None:
    assert following(name) == next_name
