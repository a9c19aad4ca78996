"""Parses and checks a profile of system calls.

A profile is an allow-list in TOML. An `[[allow]]` rule names calls that a job may make. A
`[[refuse]]` rule excludes some of them again, or answers a call with another error than EPERM.
`etc/seccomp.toml` explains every key, and is the profile that is used unless the configuration
names another one. `sandbox.seccomp.compile` makes BPF programs of a profile.

Two rules hold beyond the types. No call is both allowed and refused without conditions. And the
profile allows `NEEDED_TO_START`: the calls that a job's process makes between the filter and its
program.

Pure: the caller reads the file and passes its text.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

from attrs import field, frozen

from jobworker.errors import ConfigError
from jobworker.model.bounds import within
from jobworker.serialization.convert import faults_of
from jobworker.serialization.toml_text import MalformedTOML, loads

T = TypeVar("T")

WORD = 0xFFFFFFFF
FIRST_COMMON_NUMBER = 424
"""Calls from this number (pidfd_send_signal) on have the same number on every machine."""

NEEDED_TO_START = frozenset(
    (
        "access brk chdir close execve execveat exit_group faccessat fcntl fstat futex getsockname "
        "getsockopt lseek madvise mmap mprotect mremap munmap newfstatat read rt_sigreturn seccomp "
        "sendmsg write"
    ).split()
)
"""The calls that a child makes after it has installed the filter and before its program runs: to
become the trampoline, to receive its order, and to execute the program or report why it cannot."""


def _not_empty(_: object, __: object, value: T) -> None:
    if not value:
        raise ValueError("must not be empty")


def _words(_: object, __: object, value: tuple[int, ...]) -> None:
    if not value or any(not 0 <= number <= WORD for number in value):
        raise ValueError("must be a list of numbers from 0 to 0xffffffff")


def _numbers(_: object, __: object, value: dict[str, int]) -> None:
    if any(not FIRST_COMMON_NUMBER <= number < 1 << 16 for number in value.values()):
        raise ValueError("must hold numbers from 424 on: those below differ between machines")


@frozen(kw_only=True)
class ArgumentCondition:
    """A condition on an argument: its lower 32 bits, masked with `mask`, are one of `one_of`."""

    argument: int = field(validator=within(0, 5))
    mask: int = field(default=WORD, validator=within(1, WORD))
    one_of: tuple[int, ...] = field(validator=_words)


@frozen(kw_only=True)
class Allow:
    """Calls that a job may make where every condition of `when` holds."""

    what: str = field(validator=_not_empty)
    why: str = ""
    calls: tuple[str, ...] = field(validator=_not_empty)
    when: tuple[ArgumentCondition, ...] = ()


@frozen(kw_only=True)
class Refuse:
    """Calls that are denied where every condition of `when` holds, although a rule allows them."""

    what: str = field(validator=_not_empty)
    why: str = ""
    calls: tuple[str, ...] = field(validator=_not_empty)
    when: tuple[ArgumentCondition, ...] = ()
    error: Literal["EPERM", "ENOSYS", "EPROTONOSUPPORT"] = "EPERM"
    quiet: bool = False


@frozen(kw_only=True)
class Profile:
    """A checked profile: all rules, whether denials are logged, and the newest call it knows."""

    log: bool = True
    newest_call: int = field(validator=within(FIRST_COMMON_NUMBER, (1 << 16) - 1))
    numbers: dict[str, int] = field(factory=dict, validator=_numbers)
    allow: tuple[Allow, ...] = field(validator=_not_empty)
    refuse: tuple[Refuse, ...] = ()


def parse(text: str, name: str) -> Profile:
    """The profile in `text`, the content of the file `name`.

    Raises ConfigError, which names the file and every fault with the rule that it is in.
    """
    try:
        data = loads(text)
    except MalformedTOML as error:
        raise unusable(name, [str(error)]) from None
    profile, faults = faults_of(Profile, data)
    if profile is None:
        raise unusable(name, [_with_rule(data, fault) for fault in faults])
    faults = tuple(_faults_between(profile))
    if faults:
        raise unusable(name, faults)
    return profile


def unusable(name: str, faults: Sequence[str]) -> ConfigError:
    """The ConfigError to raise for the profile in the file `name`, which has these faults."""
    return ConfigError(
        f"cannot use the system-call profile {name}: {'; '.join(faults)}",
        remedy="correct it (etc/seccomp.toml explains every key), or unset sandbox.seccomp_profile",
        data={"faults": list(faults)},
    )


def _with_rule(data: object, fault: str) -> str:
    """The fault with its rule's name behind the rule's index: `allow[3] "signals".calls: …`."""
    kind, bracket, rest = fault.partition("[")
    number, _, _ = rest.partition("]")
    if not bracket or not number.isdigit() or not isinstance(data, dict):
        return fault
    try:
        what = data[kind][int(number)]["what"]
    except (KeyError, IndexError, TypeError):
        return fault
    return fault.replace("]", f'] "{what}"', 1)


def _faults_between(profile: Profile) -> Iterator[str]:
    """The faults of valid rules that contradict each other or together allow too little."""
    whole = {call: rule.what for rule in profile.allow if not rule.when for call in rule.calls}
    seen: dict[str, str] = {}
    for rule in profile.refuse:
        for call in rule.calls:
            if not rule.when and call in whole:
                yield (
                    f'the rule "{rule.what}" refuses {call}, which the rule "{whole[call]}" '
                    "allows: remove it from one of them"
                )
            if call in seen and not rule.when:
                yield f'{call} is refused twice, by the rules "{seen[call]}" and "{rule.what}"'
            seen[call] = rule.what
            if rule.when and rule.quiet:
                yield f'the rule "{rule.what}" cannot be quiet: only one without conditions can'
    allowed = {call for rule in profile.allow for call in rule.calls}
    missing = sorted(NEEDED_TO_START - allowed)
    if missing:
        yield f"no rule allows {', '.join(missing)}, without which no job can be started"
