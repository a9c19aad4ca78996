"""From a profile to the two BPF programs that a job runs under.

    the list    what is allowed; everything else is EPERM, calls of another ABI ENOSYS; denials are
                told to the kernel's audit where the profile says so
    the quiet   refusals that would fill a log, such as clone3, which the C library tries for every
                thread, and what the kernel has gained since the profile was written (ENOSYS)

The kernel runs both for a call and takes the severer answer; among equals that of the program
installed last, which is the quiet one: it says "ENOSYS, not logged" before the list can say "EPERM,
logged". Logging is a property of a whole program (SECCOMP_FILTER_FLAG_LOG), hence two.

libseccomp cannot state "allowed, except where an argument is …": a rule without conditions
replaces those with conditions. So refusals make a program of their own, and where that one allows,
it goes on into the program of the permissions: both are linked into the list.
"""

import errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path

from jobworker.errors import ConfigError
from jobworker.sandbox.seccomp.libseccomp import (
    ALLOW,
    ARCHITECTURES,
    Call,
    Comparison,
    Context,
    error,
    number_of,
)
from jobworker.sandbox.seccomp.profile import Allow, Condition, Profile, Refuse, parse, unusable
from jobworker.sandbox.seccomp.program import INSTRUCTION_BYTES, MAX_INSTRUCTIONS, Filters

_INSTRUCTION = struct.Struct("=HBBI")
# <linux/bpf_common.h>: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JA, …|BPF_JEQ, …|BPF_JGT, BPF_RET|BPF_K
_LOAD, _GO, _IF_EQUAL, _IF_GREATER, _RETURN = 0x20, 0x05, 0x15, 0x25, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # struct seccomp_data of <linux/seccomp.h>
_X32_BIT = 0x40000000


def load_filters(path: str) -> Filters:
    """The programs of the profile at `path`, "" for the one that comes with the package.

    Raises ConfigError for a profile that cannot be read or used, HostUnsupported where there is
    no libseccomp.
    """
    try:
        if path:
            text = Path(path).read_text(encoding="utf-8")
        else:
            profile = resources.files("jobworker.sandbox.seccomp") / "seccomp.toml"
            path, text = str(profile), profile.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"cannot read the system-call profile {path or 'of the package'}: {reason}",
            remedy="correct sandbox.seccomp_profile, or unset it for the profile of the package",
        ) from None
    return compile_profile(parse(text, path), path, os.uname().machine)


def compile_profile(profile: Profile, name: str, machine: str) -> Filters:
    """The programs of `profile`, from the file `name`, for x86_64 or aarch64.

    Raises ConfigError for a call that no machine has and a profile beyond the kernel's bound.
    """
    calls = _calls(profile, name, machine)
    differing = [rule for rule in profile.refuse if rule.when or rule.error != "EPERM"]
    loud = [rule for rule in differing if not rule.quiet]
    listed = _link(
        _program(loud, calls, ALLOW, machine),
        _program(profile.allow, calls, error(errno.EPERM), machine),
    )
    if len(listed) > MAX_INSTRUCTIONS * INSTRUCTION_BYTES:
        raise unusable(name, [f"it makes more than {MAX_INSTRUCTIONS} instructions"])
    return Filters(listed, _quiet_program(profile, calls, machine), profile.log)


def _calls(profile: Profile, name: str, machine: str) -> dict[str, Call]:
    """The calls of the profile that the machine has."""
    found: dict[str, Call] = {}
    faults = []
    rules: tuple[Allow | Refuse, ...] = (*profile.allow, *profile.refuse)
    for rule in rules:
        for call in rule.calls:
            try:
                number = number_of(call, machine)
            except KeyError:
                number = profile.numbers.get(call)
                if number is None:
                    faults.append(
                        f'the rule "{rule.what}" names {call!r}, which is no system call that the '
                        "installed libseccomp knows: correct it, or give its number in [numbers]"
                    )
            if number is not None:
                found[call] = Call(call, number)
    if faults:
        raise unusable(name, faults)
    return found


def _program(
    rules: Sequence[Allow | Refuse], calls: Mapping[str, Call], default: int, machine: str
) -> bytes:
    foreign = error(errno.ENOSYS)
    with Context(default, foreign, machine) as context:
        for rule in rules:
            action = ALLOW if isinstance(rule, Allow) else error(getattr(errno, rule.error))
            for call in filter(None, map(calls.get, rule.calls)):
                for comparisons in _alternatives(rule.when):
                    context.add(action, call, comparisons)
        return context.program()


def _alternatives(when: Sequence[Condition]) -> Iterator[list[Comparison]]:
    """Every choice of one number for each condition."""
    for chosen in product(*(condition.one_of for condition in when)):
        yield [
            Comparison(condition.argument, condition.mask, number & condition.mask)
            for condition, number in zip(when, chosen, strict=True)
        ]


def _link(first: bytes, second: bytes) -> bytes:
    """One program that goes on into `second` wherever `first` allows: jumps count forward only."""
    end = len(first) // INSTRUCTION_BYTES
    linked = []
    for index, (code, yes, no, value) in enumerate(_INSTRUCTION.iter_unpack(first)):
        allows = (code, value) == (_RETURN, ALLOW)
        linked.append((_GO, 0, 0, end - index - 1) if allows else (code, yes, no, value))
    return b"".join(_INSTRUCTION.pack(*each) for each in linked) + second


def _quiet_program(profile: Profile, calls: Mapping[str, Call], machine: str) -> bytes:
    """The program that answers before the list does, without a word; allows all the rest.

    Calls of another ABI are left to the list.
    """
    allow, missing = ALLOW, error(errno.ENOSYS)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, allow),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_GREATER, 0, 3, profile.newest_call),
        (_IF_GREATER, 0, 1, _X32_BIT - 1),
        (_RETURN, 0, 0, allow),
        (_RETURN, 0, 0, missing),
    ]
    for rule in profile.refuse:
        if rule.quiet:
            action = error(getattr(errno, rule.error))
            for call in filter(None, map(calls.get, rule.calls)):
                program += [(_IF_EQUAL, 0, 1, call.number), (_RETURN, 0, 0, action)]
    program.append((_RETURN, 0, 0, allow))
    return b"".join(_INSTRUCTION.pack(*each) for each in program)
