"""The launcher's first word, and which versions work together."""

import pytest

from jobworker.sandbox.protocol import fields as f
from jobworker.sandbox.protocol import greeting
from jobworker.sandbox.protocol.greeting import NotReady, Ready
from jobworker.sandbox.protocol.version import PROTOCOL, mismatch

READY = Ready("v2", ("no memory.peak",), {"instance": "i"}, bounds_disks=True, keeps_asks=True)
UNREADY = NotReady(1010, "cannot start the launcher", "start it anew")


def test_first_word_arrives_as_it_was_said() -> None:
    assert greeting.ready_from(greeting.message_of(READY)) == READY
    assert greeting.refusal_in(greeting.message_of(READY)) is None
    assert greeting.refusal_in(greeting.message_of(UNREADY)) == UNREADY


def test_earlier_launcher_keeps_no_asks() -> None:
    message = greeting.message_of(READY)
    del message["keeps_asks"]
    assert greeting.ready_from(message) == READY._replace(keeps_asks=False)


@pytest.mark.parametrize("name", ["ready", "gaps", "policy", "bounds_disks"])
def test_word_without_a_member_is_refused_by_name(name: str) -> None:
    message = greeting.message_of(READY)
    del message[name]
    with pytest.raises(f.Malformed, match=rf"^{name} is n"):
        greeting.ready_from(message)


@pytest.mark.parametrize("error", [None, "x", {}, {"code": "1", "message": "", "remedy": ""}])
def test_refusal_that_says_nothing_is_refused(error: object) -> None:
    with pytest.raises(f.Malformed):
        greeting.refusal_in({"error": error})


def test_one_version_works_with_itself_alone() -> None:
    assert mismatch(PROTOCOL, PROTOCOL) == ""
    for other in (PROTOCOL - 1, PROTOCOL + 1, "x"):
        assert f"version {other}" in mismatch(other, PROTOCOL)
        assert f"the service version {other}" in mismatch(PROTOCOL, other)


def test_side_that_tells_no_version_is_of_an_unknown_one() -> None:
    assert "it speaks version unknown" in mismatch(None, PROTOCOL)
    assert "the service version unknown" in mismatch(PROTOCOL, None)
