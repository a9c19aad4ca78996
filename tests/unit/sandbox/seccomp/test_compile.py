"""The programs: what the kernel would answer to a call, for both machines."""

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobworker.errors import ConfigError
from jobworker.sandbox.seccomp import compile as seccomp_filter
from jobworker.sandbox.seccomp.compile import compile_profile, load_filters
from jobworker.sandbox.seccomp.libseccomp import number_of
from jobworker.sandbox.seccomp.profile import parse
from jobworker.sandbox.seccomp.program import Filters

from ...strategies import examples
from ..bpf_machine import ALLOW, ENOSYS, EPERM, answer, run
from .test_profile import DOCUMENTED, SOUND

MACHINES = ("x86_64", "aarch64")
PROFILE = parse(DOCUMENTED.read_text(), str(DOCUMENTED))
FILTERS = {machine: compile_profile(PROFILE, "etc/seccomp.toml", machine) for machine in MACHINES}


def asked(machine: str, call: str, *arguments: int) -> int:
    """The answer to a call by name."""
    number = number_of(call, machine)
    assert number is not None
    filters = FILTERS[machine]
    return answer([filters.listed, filters.quiet], number, *arguments, machine=machine)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_allowed_without_conditions_is_allowed(machine: str) -> None:
    conditional = {call for rule in PROFILE.allow if rule.when for call in rule.calls}
    for rule in PROFILE.allow:
        for call in set(rule.calls) - conditional - {"ioctl"} - set(PROFILE.numbers):
            if number_of(call, machine) is not None:
                assert asked(machine, call) == ALLOW, call


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_refused_without_conditions_is_refused(machine: str) -> None:
    for rule in PROFILE.refuse:
        if rule.when:
            continue
        for call in rule.calls:
            if number_of(call, machine) is not None:
                expected = {"EPERM": EPERM, "ENOSYS": ENOSYS}[rule.error]
                assert asked(machine, call) == expected, call


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_that_no_rule_allows_is_denied(machine: str) -> None:
    """Whatever its name: an allow-list, not a list of what somebody thought of."""
    filters = FILTERS[machine]
    named = {call for rule in PROFILE.allow for call in rule.calls}
    known = {number_of(call, machine) for call in named - set(PROFILE.numbers)}
    answered = {
        number_of(call, machine)
        for rule in PROFILE.refuse
        if rule.error == "ENOSYS"
        for call in rule.calls
    }
    for number in range(600):
        if number not in known and number not in PROFILE.numbers.values():
            said = answer([filters.listed, filters.quiet], number, machine=machine)
            missing = number in answered or number > PROFILE.newest_call
            assert said == (ENOSYS if missing else EPERM), number


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("socket", (1, 1, 0), ALLOW),
        ("socket", (2, 1, 0), ALLOW),
        ("socket", (10, 2, 0), ALLOW),
        ("socket", (16, 3, 0), ALLOW),
        ("socket", (16, 3, 9), EPERM),
        ("socket", (17, 3, 0), EPERM),
        ("socket", (38, 5, 0), EPERM),
        ("socket", (40, 1, 0), EPERM),
        ("socket", (0xFFFFFFFF, 1, 0), EPERM),
        ("socket", (1 << 32 | 38, 1, 0), EPERM),
        ("socketpair", (1, 1, 0), ALLOW),
        ("socketpair", (30, 1, 0), EPERM),
        ("personality", (0,), ALLOW),
        ("personality", (0xFFFFFFFF,), ALLOW),
        ("personality", (0xFFFFFFFFFFFFFFFF,), ALLOW),
        ("personality", (0x0040000,), EPERM),
        ("personality", (0x0400000,), EPERM),
        ("clone", (0x01200011,), ALLOW),
        ("clone", (0x003D0F00,), ALLOW),
        ("unshare", (0x200,), ALLOW),
        ("unshare", (0x80,), EPERM),
        ("ioctl", (0, 0x5413), ALLOW),
        ("ioctl", (0, 0x5412), EPERM),
        ("ioctl", (0, 0x541C), EPERM),
        ("ioctl", (0, 0x5423), EPERM),
        ("ioctl", (0, 1 << 32 | 0x5412), EPERM),
        ("ioctl", (0, 0xFFFFFFFF << 32 | 0x541C), EPERM),
    ],
)
def test_arguments_decide(
    machine: str, call: str, arguments: tuple[int, ...], expected: int
) -> None:
    assert asked(machine, call, *arguments) == expected


NAMESPACES = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)


@examples(max_examples=200)
@given(
    st.sampled_from(MACHINES),
    st.sampled_from(["clone", "unshare"]),
    st.sampled_from(NAMESPACES),
    st.integers(0, (1 << 64) - 1),
)
def test_no_flag_of_a_namespace_gets_by(machine: str, call: str, flag: int, others: int) -> None:
    assert asked(machine, call, others | flag) == EPERM


@examples(max_examples=200)
@given(st.sampled_from([0x5412, 0x541C]), st.integers(0, (1 << 32) - 1))
def test_no_bit_above_hides_a_request(request_: int, above: int) -> None:
    assert asked("x86_64", "ioctl", 0, above << 32 | request_) == EPERM


@pytest.mark.parametrize("number", [0, 1, 59, 0x40000000, 0x40000001, 0x40000208, 0x7FFFFFFF])
def test_x32_numbers_are_not_there(number: int) -> None:
    filters = FILTERS["x86_64"]
    expected = ENOSYS if number >= 0x40000000 else ALLOW
    assert answer([filters.listed, filters.quiet], number) == expected
    assert number < 0x40000000 or run(filters.quiet, number) == ALLOW, "the list's, which logs"


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_of_another_machine_are_not_there(machine: str) -> None:
    filters = FILTERS[machine]
    for foreign in {"i386", *MACHINES} - {machine}:
        for number in range(0, 500, 7):
            said = answer([filters.listed, filters.quiet], number, machine=foreign)
            assert said == ENOSYS


def test_refusals_that_would_fill_a_log_are_answered_by_the_quiet_program() -> None:
    filters = FILTERS["x86_64"]
    clone3 = number_of("clone3", "x86_64")
    assert clone3 is not None
    assert run(filters.quiet, clone3) == ENOSYS
    assert run(filters.quiet, PROFILE.newest_call + 1) == ENOSYS
    assert run(filters.quiet, PROFILE.newest_call) == ALLOW
    bpf = number_of("bpf", "x86_64")
    assert bpf is not None
    assert run(filters.quiet, bpf) == ALLOW


def test_programs_are_within_the_kernels_bound_and_of_whole_instructions() -> None:
    for filters in FILTERS.values():
        for program in (filters.listed, filters.quiet):
            assert len(program) % 8 == 0
            assert 0 < len(program) // 8 <= 1024


def test_package_carries_the_documented_profile() -> None:
    assert load_filters("") == load_filters(str(DOCUMENTED))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (SOUND + '[[allow]]\nwhat="x"\ncalls=["opne"]', "the rule \"x\" names 'opne'"),
        (SOUND + '[[refuse]]\nwhat="y"\ncalls=["Bpf"]', "the rule \"y\" names 'Bpf'"),
        ("\x00", "it is not TOML"),
        ("a = " + "[" * 20_000, "its values are nested too deeply"),
        (b"\xff", "it is not UTF-8 text"),
        (b"\xef\xbb\xbf", "it begins with a byte order mark"),
        (None, "No such file or directory"),
    ],
)
def test_profile_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, text: str | bytes | None, fault: str
) -> None:
    path = tmp_path / "own.toml"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_filters(str(path))
    assert str(path) in caught.value.message
    assert fault in caught.value.message
    assert caught.value.remedy


def test_call_that_the_library_does_not_know_can_be_given_by_number() -> None:
    text = SOUND + '[[allow]]\nwhat="x"\ncalls=["of_tomorrow"]\n[numbers]\nof_tomorrow = 468'
    filters = compile_profile(parse(text, "own"), "own", "x86_64")
    assert isinstance(filters, Filters)
    assert answer([filters.listed, filters.quiet], 468) == ALLOW
    assert answer([filters.listed, filters.quiet], 467) == EPERM


def test_profile_beyond_the_kernels_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lowered, since libseccomp takes many seconds for a profile that is really beyond it.
    monkeypatch.setattr(seccomp_filter, "MAX_INSTRUCTIONS", 100)
    with pytest.raises(ConfigError, match="more than 100 instructions"):
        compile_profile(PROFILE, "own", "x86_64")


def test_errnos_are_those_that_the_machine_of_the_tests_has() -> None:
    assert (0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS) == (EPERM, ENOSYS)
