"""The system-call filter as the launcher has it: finished BPF programs, taken or refused.

The launcher gets the programs in its policy and understands nothing of them; what it holds is that
no job runs without: a program that is missing, not of whole instructions or beyond the kernel's
bound is refused at the start, and so are programs that the kernel does not take, which a child that
ends at once tries out. There is no switch that turns the filter off.

`sandbox.seccomp.compile` makes the programs. Standard library only.
"""

import base64
import os
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from jobworker.errors import HostUnsupported
from jobworker.sandbox import syscalls as sc

INSTRUCTION_BYTES = 8
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS of <linux/bpf_common.h>."""


class Filters(NamedTuple):
    """The two programs that a job runs under, and whether denials of the first are logged."""

    listed: bytes
    quiet: bytes
    log: bool


def filters_message(filters: Filters) -> dict[str, object]:
    """What `filters_from` reads."""
    listed, quiet = (base64.b64encode(program).decode() for program in filters[:2])
    return {"listed": listed, "quiet": quiet, "log": filters.log}


def filters_from(message: Mapping[str, object]) -> Filters:
    """The programs of `filters_message`. Raises HostUnsupported for what cannot be programs."""
    return Filters(
        _program(message.get("listed")), _program(message.get("quiet")), message.get("log") is True
    )


def _program(text: object) -> bytes:
    try:
        program = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError:
        program = b""
    whole = len(program) % INSTRUCTION_BYTES == 0
    if not whole or not 0 < len(program) <= MAX_INSTRUCTIONS * INSTRUCTION_BYTES:
        raise HostUnsupported(
            "cannot run jobs: the system-call filter is missing or no BPF program",
            remedy="correct the profile that sandbox.seccomp_profile names",
        )
    return program


def install(filters: Filters) -> None:
    """Put this process under the filter for good; no_new_privs has to be set: seccomp(2).

    The quiet program comes last: among equal answers the kernel takes that of the newest.
    """
    sc.seccomp(filters.listed, log=filters.log)
    sc.seccomp(filters.quiet, log=False)


def try_out(filters: Filters) -> None:
    """Have the kernel take the programs once. Raises HostUnsupported with its reason."""
    pid, pidfd = sc.clone3(0)
    if pid == 0:
        _install_and_exit(filters)
    status = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert status is not None
    if status.si_status:
        reason = "the kernel killed it" if status.si_code != os.CLD_EXITED else ""
        raise HostUnsupported(
            f"cannot filter system calls: {reason or os.strerror(status.si_status)}",
            remedy="use a kernel with CONFIG_SECCOMP_FILTER, and a profile that it takes",
        )


def _install_and_exit(filters: Filters) -> NoReturn:
    code = 255
    try:
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
        install(filters)
        code = 0
    except OSError as error:
        code = error.errno or 255
    finally:
        os._exit(code)
