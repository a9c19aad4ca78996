"""What the launcher is told once (its policy) and each child once (its order), over the wire."""

from hypothesis import given
from hypothesis import strategies as st

from jobworker.sandbox.channel import Message, decode, encode
from jobworker.sandbox.protocol.policy import Policy, policy_from, policy_message
from jobworker.sandbox.seccomp.program import Filters

from ...strategies import examples, texts

programs = st.integers(1, 8).flatmap(lambda size: st.binary(min_size=8 * size, max_size=8 * size))
words = st.lists(texts, max_size=4).map(tuple)
policies = st.builds(
    Policy,
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
def test_policy_arrives_as_it_was_sent(policy: Policy) -> None:
    assert policy_from(sent(policy_message(policy))) == policy


def test_policy_tells_every_field() -> None:
    filters = Filters(bytes(8), bytes(8), True)
    policy = Policy(
        "i",
        "/",
        "/",
        "/",
        ("cpu",),
        "",
        ("/usr",),
        ("hosts",),
        100_000,
        1,
        0,
        1,
        filters,
        1,
        0,
        True,
        {},
    )
    assert set(policy_message(policy)) == set(Policy._fields)
