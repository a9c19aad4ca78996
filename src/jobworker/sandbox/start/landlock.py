"""Landlock for what namespaces leave open: abstract UNIX sockets, and signals.

A job on the host's network shares its abstract UNIX sockets, which have no file and no owner
(CVE-2020-15257). A domain that is scoped may connect and send signals only to processes inside it.
Each job enters one of its own, so that jobs cannot reach one another either. Nothing about files is
stated: a domain with a right on files forbids every mount(2).

Linux 6.12 (Landlock ABI 6), see landlock(7). Standard library only.
"""

import contextlib

from jobworker.sandbox import syscalls as sc

SCOPING_ABI = 6
GAP = (
    "abstract UNIX sockets: jobs on the host's network reach those of the host, since this "
    "kernel's Landlock cannot scope them (Linux 6.12 or newer, with landlock in lsm=)"
)


def open_scope() -> int | None:
    """A ruleset that scopes sockets and signals, close-on-exec; None where the kernel has none.

    It is made once: entering it makes a domain for each job.
    """
    with contextlib.suppress(OSError):
        if sc.landlock_abi() >= SCOPING_ABI:
            return sc.landlock_create_scope()
    return None
