"""What the launcher is told once (its policy) and each child once (its order), over the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import ProtocolError
from jobworker.sandbox.channel import Message, decode, encode
from jobworker.sandbox.protocol.policy import (
    LauncherPolicy,
    carried_in,
    policy_from,
    policy_message,
    service_uid_in,
)
from jobworker.sandbox.seccomp import program as bpf
from jobworker.sandbox.seccomp.program import Filters

from ...strategies import examples, texts

programs = st.integers(1, 8).flatmap(lambda size: st.binary(min_size=8 * size, max_size=8 * size))
words = st.lists(texts, max_size=4).map(tuple)
policies = st.builds(
    LauncherPolicy,
    instance=texts,
    stage=texts,
    scratch=texts,
    volumes=texts,
    controllers=words,
    cgroup_parent=texts,
    programs=words,
    etc=words,
    first_uid=st.integers(100_000, 1 << 32),
    max_jobs=st.integers(1, 4000),
    spares=st.integers(0, 64),
    tmpfs_bytes=st.integers(1, 1 << 50),
    filters=st.builds(Filters, listed=programs, quiet=programs, log=st.booleans()),
    disk_bytes=st.integers(1, 1 << 50),
    keep_free_bytes=st.integers(0, 1 << 50),
    overcommit=st.booleans(),
    runtimes=st.dictionaries(texts, texts, max_size=3),
)


def sent(message: Message) -> Message:
    """The message as its receiver has it."""
    packet, ancillary, _ = encode(message, ())
    assert ancillary == []
    return decode(packet, ancillary, 0)[0]


@examples(max_examples=100)
@given(policies)
def test_policy_arrives_as_it_was_sent(policy: LauncherPolicy) -> None:
    assert policy_from(sent(policy_message(policy))) == policy


POLICY = LauncherPolicy(
    instance="i",
    stage="/",
    scratch="/",
    volumes="/",
    controllers=("cpu",),
    cgroup_parent="",
    programs=("/usr",),
    etc=("hosts",),
    first_uid=100_000,
    max_jobs=1,
    spares=0,
    tmpfs_bytes=1,
    filters=Filters(bytes(8), bytes(8), True),
    disk_bytes=1,
    keep_free_bytes=0,
    overcommit=True,
    runtimes={"small": "/srv/small"},
)
MESSAGE = policy_message(POLICY)


def test_policy_tells_every_field_in_order() -> None:
    assert list(MESSAGE) == list(LauncherPolicy._fields)


def test_policy_that_is_kept_as_json_compares_with_one_that_is_made_anew() -> None:
    assert sent(MESSAGE) == policy_message(POLICY)


@pytest.mark.parametrize("name", LauncherPolicy._fields)
@pytest.mark.parametrize("value", [None, -1, 1.0, 1 << 63, [1], {"a": 1}, ["x", None]])
def test_field_of_another_kind_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=f"cannot take the policy: {name}"):
        policy_from({**MESSAGE, name: value})


@pytest.mark.parametrize("name", ["first_uid", "max_jobs", "spares", "tmpfs_bytes"])
def test_truth_is_no_number(name: str) -> None:
    with pytest.raises(ProtocolError, match=f"{name} is no integer"):
        policy_from({**MESSAGE, name: True})


@pytest.mark.parametrize("name", LauncherPolicy._fields)
def test_field_that_is_missing_is_refused_by_name(name: str) -> None:
    with pytest.raises(ProtocolError, match=f"cannot take the policy: {name}"):
        policy_from({each: value for each, value in MESSAGE.items() if each != name})


def test_filters_that_tell_no_log_are_refused_by_name() -> None:
    filters = bpf.filters_message(POLICY.filters)
    with pytest.raises(ProtocolError, match=r"filters\.log is neither true nor false"):
        policy_from({**MESSAGE, "filters": {**filters, "log": "yes"}})


def test_field_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="it knows no field 'gpus'"):
        policy_from({**MESSAGE, "gpus": 1})
    assert policy_from({**MESSAGE, "carries": [], "service_uid": 7}) == POLICY


def test_descriptors_have_the_names_that_the_message_tells() -> None:
    assert carried_in(MESSAGE, []) == {}
    assert carried_in({**MESSAGE, "carries": ["lock", "ids"]}, [7, 9]) == {"lock": 7, "ids": 9}


@pytest.mark.parametrize("names", [None, "lock", [1, 2], ["lock"], ["lock"] * 2, ["a", "b", "c"]])
def test_names_that_are_not_those_of_the_descriptors_are_refused(names: object) -> None:
    with pytest.raises(ProtocolError, match="cannot take the policy: carries"):
        carried_in({**MESSAGE, "carries": names}, [7, 9])


@pytest.mark.parametrize("uid", [None, "0", True, -1])
def test_user_who_may_call_is_a_number(uid: object) -> None:
    assert service_uid_in({"service_uid": 7}) == 7
    with pytest.raises(ProtocolError, match="service_uid is no integer"):
        service_uid_in({"service_uid": uid})
