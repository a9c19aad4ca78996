"""Checks and installs the finished BPF programs of the system-call filter, in the launcher.

`sandbox.seccomp.compile` makes the programs, and the policy carries them to the launcher, which
does not interpret them. The launcher ensures that no job runs without a filter. At its start it
refuses a program that is missing, has a partial instruction or exceeds the kernel's bound. It also
has a short-lived child install the programs once, and refuses those that the kernel rejects. There
is no switch that turns the filter off.

Standard library only.
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
    """The two programs that a job runs under, and whether the kernel logs denials of `listed`."""

    listed: bytes
    quiet: bytes
    log: bool


def filters_message(filters: Filters) -> dict[str, object]:
    """The filters as an object for JSON, the programs in base64; `filters_from` reads it."""
    listed, quiet = (base64.b64encode(program).decode() for program in filters[:2])
    return {"listed": listed, "quiet": quiet, "log": filters.log}


def filters_from(message: Mapping[str, object]) -> Filters:
    """The filters in an object of `filters_message`.

    Raises HostUnsupported if a program is missing, malformed or too long.
    """
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
    """Install both programs in this process, irrevocably: seccomp(2).

    The process must have set no_new_privs. The quiet program is installed last, because of two
    answers of equal severity the kernel takes that of the newest program. Raises OSError.
    """
    sc.seccomp(filters.listed, log=filters.log)
    sc.seccomp(filters.quiet, log=False)


def try_out(filters: Filters) -> None:
    """Check that the kernel accepts the programs: a child installs them and exits.

    Raises HostUnsupported with the kernel's reason if it does not.
    """
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
