"""The profile: read exactly, or refused by the name of file and rule."""

import re
from pathlib import Path

import pytest

from jobworker.errors import ConfigError
from jobworker.sandbox.seccomp.profile import NEEDED_TO_START, Allow, Refuse, parse

DOCUMENTED = Path(__file__).resolve().parents[4] / "etc" / "seccomp.toml"
SOUND = f"""
newest_call = 469
[[allow]]
what = "all that a start takes"
calls = [{", ".join(f'"{call}"' for call in sorted(NEEDED_TO_START))}]
"""


def faults_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "/etc/own.toml")
    assert caught.value.message.startswith("cannot use the system-call profile /etc/own.toml: ")
    assert caught.value.remedy
    faults = caught.value.data["faults"]
    assert isinstance(faults, list)
    return faults


def test_documented_profile_is_sound_and_explains_itself() -> None:
    profile = parse(DOCUMENTED.read_text(), str(DOCUMENTED))
    rules: list[Allow | Refuse] = [*profile.allow, *profile.refuse]
    assert len({rule.what for rule in rules}) == len(rules)
    assert all(rule.why for rule in rules if rule.when)
    assert profile.log


def test_documented_profile_names_no_call_twice_without_conditions() -> None:
    profile = parse(DOCUMENTED.read_text(), str(DOCUMENTED))
    allowed = [call for rule in profile.allow if not rule.when for call in rule.calls]
    assert len(set(allowed)) == len(allowed)
    assert len(allowed) > 250


@pytest.mark.parametrize(
    ("addition", "fault"),
    [
        ("[[allow]\n", r"it is not TOML: .*line \d+"),
        ("[[allow]]\nwhat = 'x'\n", r'allow\[1\] "x"\.calls: is missing'),
        ("[[allow]]\ncalls = ['read']\n", r"allow\[1\]\.what: is missing"),
        ("[[allow]]\nwhat = 'x'\ncalls = 'read'\n", r'"x"\.calls: must be a list'),
        ("[[allow]]\nwhat = 'x'\ncalls = [0]\n", r'"x"\.calls\[0\]: must be a string'),
        ("[[allow]]\nwhat = 'x'\ncalls = []\n", r'"x"\.calls: must not be empty'),
        ("[[allow]]\nwhat = 'x'\ncalls = ['read']\nerror = 'EPERM'\n", "unknown key 'error'"),
        ("[[deny]]\nwhat = 'x'\ncalls = ['read']\n", "unknown key 'deny'"),
        ("[[refuse]]\nwhat = 'x'\ncalls = ['bpf']\nerror = 'EIO'\n", r'"x"\.error: must be one of'),
        ("[[refuse]]\nwhat = 'x'\ncalls = ['bpf']\nquiet = 1\n", "must be true or false"),
        ("[[refuse]]\nwhat = 'x'\ncalls = ['write']\n", "refuses write, which the rule .* allows"),
        (
            "[[refuse]]\nwhat = 'x'\ncalls = ['bpf']\n[[refuse]]\nwhat = 'y'\ncalls = ['bpf']\n",
            'bpf is refused twice, by the rules "x" and "y"',
        ),
        ("[numbers]\nread = 0\n", "numbers: must hold numbers from 424 on"),
    ],
)
def test_fault_is_told_by_its_rule(addition: str, fault: str) -> None:
    assert any(re.search(fault, told) for told in faults_of(SOUND + addition)), faults_of(
        SOUND + addition
    )


@pytest.mark.parametrize(
    ("condition", "fault"),
    [
        ("{argument = 6, one_of = [1]}", "argument: must be from 0 to 5, not 6"),
        ("{argument = 0, one_of = []}", "one_of: must be a list of numbers"),
        ("{argument = 0, one_of = [0x100000000]}", "one_of: must be a list of numbers"),
        ("{argument = 0, one_of = [-1]}", "one_of: must be a list of numbers"),
        ("{argument = 0, mask = 0, one_of = [0]}", "mask: must be from 1"),
        ("{argument = '0', one_of = [0]}", "argument: must be an integer"),
        ("{one_of = [0]}", "argument: is missing"),
    ],
)
def test_fault_in_a_condition_is_told_by_its_place(condition: str, fault: str) -> None:
    rule = f"[[allow]]\nwhat = 'x'\ncalls = ['socket']\nwhen = [{condition}]\n"
    (told,) = faults_of(SOUND + rule)
    assert fault in told
    assert told.startswith('allow[1] "x".when[0]')


def test_quiet_refusal_has_no_conditions() -> None:
    rule = (
        "[[refuse]]\nwhat = 'x'\ncalls = ['ioctl']\nwhen = [{argument = 1, one_of = [1]}]\n"
        "quiet = true\n"
    )
    assert faults_of(SOUND + rule) == [
        'the rule "x" cannot be quiet: only one without conditions can'
    ]


def test_all_faults_are_told_at_once() -> None:
    assert len(faults_of(SOUND + "[[allow]]\nwhat = 1\n[[refuse]]\ncalls = 2\n")) >= 3


@pytest.mark.parametrize("call", sorted(NEEDED_TO_START))
def test_profile_without_what_a_start_takes_is_refused(call: str) -> None:
    assert faults_of(SOUND.replace(f'"{call}"', '"getpid"')) == [
        f"no rule allows {call}, without which no job can be started"
    ]
