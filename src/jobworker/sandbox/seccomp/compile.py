"""Compiles a profile into the two BPF programs that a job runs under.

    the list    allows the calls that the profile names. Every other call gets EPERM, and a call
                of another ABI gets ENOSYS. The kernel's audit log records each denial, where the
                profile asks for it.
    the quiet   refuses calls whose denials would fill the log: clone3, for example, which the C
                library tries for every thread. Calls that are newer than the profile get ENOSYS.

The kernel runs both programs for each call and takes the severer answer. Of two answers of equal
severity it takes that of the program which was installed last (seccomp(2)). That is the quiet one,
so its "ENOSYS, not logged" wins over the list's "EPERM, logged". There are two programs because
logging is a property of a whole program (SECCOMP_FILTER_FLAG_LOG).

libseccomp cannot express "allowed, except where an argument is …", because a rule without
conditions replaces all rules of that call with conditions. So refusals and permissions are compiled
separately and then linked into the list: where the first program allows a call, it jumps to the
second one.
"""

import errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import product

from jobworker.errors import ConfigError
from jobworker.regular_file import NotText, read_text
from jobworker.sandbox.seccomp.libseccomp import (
    ALLOW,
    ARCHITECTURES,
    Comparison,
    FilterBuilder,
    SystemCall,
    error,
    number_of,
)
from jobworker.sandbox.seccomp.profile import (
    Allow,
    ArgumentCondition,
    Profile,
    Refuse,
    parse,
    unusable,
)
from jobworker.sandbox.seccomp.program import INSTRUCTION_BYTES, MAX_INSTRUCTIONS, Filters

_INSTRUCTION = struct.Struct("=HBBI")
# <linux/bpf_common.h>: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JA, …|BPF_JEQ, …|BPF_JGT, BPF_RET|BPF_K
_LOAD, _GO, _IF_EQUAL, _IF_GREATER, _RETURN = 0x20, 0x05, 0x15, 0x25, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4  # struct seccomp_data of <linux/seccomp.h>
_X32_BIT = 0x40000000


def load_filters(path: str) -> Filters:
    """The two programs for this machine, of the profile at `path`.

    An empty `path` is the profile that comes with the package. Raises ConfigError if the profile
    cannot be read or used, and HostUnsupported if libseccomp is not installed.
    """
    try:
        if path:
            text = read_text(path)
        else:
            profile = resources.files("jobworker.sandbox.seccomp") / "seccomp.toml"
            path, text = str(profile), profile.read_text(encoding="utf-8")
    except (OSError, NotText) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else str(fault)
        raise ConfigError(
            f"cannot read the system-call profile {path or 'of the package'}: {reason}",
            remedy="correct sandbox.seccomp_profile, or unset it for the profile of the package",
        ) from None
    return compile_profile(parse(text, path), path, os.uname().machine)


def compile_profile(profile: Profile, name: str, machine: str) -> Filters:
    """The two programs of `profile`, which stands in the file `name`, for `machine`.

    `machine` is "x86_64" or "aarch64". Raises ConfigError if the profile names an unknown system
    call, or if its list has more than `MAX_INSTRUCTIONS` instructions.
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


def _calls(profile: Profile, name: str, machine: str) -> dict[str, SystemCall]:
    """The system calls of the profile, by name, without those that `machine` does not have."""
    found: dict[str, SystemCall] = {}
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
                found[call] = SystemCall(call, number)
    if faults:
        raise unusable(name, faults)
    return found


def _program(
    rules: Sequence[Allow | Refuse], calls: Mapping[str, SystemCall], default: int, machine: str
) -> bytes:
    foreign = error(errno.ENOSYS)
    with FilterBuilder(default, foreign, machine) as context:
        for rule in rules:
            action = ALLOW if isinstance(rule, Allow) else error(getattr(errno, rule.error))
            for call in filter(None, map(calls.get, rule.calls)):
                for comparisons in _alternatives(rule.when):
                    context.add(action, call, comparisons)
        return context.program()


def _alternatives(when: Sequence[ArgumentCondition]) -> Iterator[list[Comparison]]:
    """Every combination of the conditions' values: libseccomp compares with one value at a time."""
    for chosen in product(*(condition.one_of for condition in when)):
        yield [
            Comparison(condition.argument, condition.mask, number & condition.mask)
            for condition, number in zip(when, chosen, strict=True)
        ]


def _link(first: bytes, second: bytes) -> bytes:
    """One program that continues with `second` wherever `first` would allow the call.

    Each ALLOW of `first` becomes a jump to the instruction behind its end. BPF jumps are relative
    and lead forward only, so `second` follows `first`.
    """
    end = len(first) // INSTRUCTION_BYTES
    linked = []
    for index, (code, yes, no, value) in enumerate(_INSTRUCTION.iter_unpack(first)):
        allows = (code, value) == (_RETURN, ALLOW)
        linked.append((_GO, 0, 0, end - index - 1) if allows else (code, yes, no, value))
    return b"".join(_INSTRUCTION.pack(*each) for each in linked) + second


def _quiet_program(profile: Profile, calls: Mapping[str, SystemCall], machine: str) -> bytes:
    """The program whose refusals are not logged. It allows every other call.

    It also allows calls of another ABI and of x32, which the list refuses.
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
