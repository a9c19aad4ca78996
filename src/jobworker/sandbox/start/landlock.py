"""Makes the Landlock ruleset that closes what namespaces leave open: abstract sockets and signals.

A job on the host's network shares the host's abstract UNIX sockets, which have no file and no owner
(CVE-2020-15257). A process in a scoped Landlock domain can connect and send signals only to
processes of the same domain. Each job enters a domain of its own, so jobs cannot reach one another
either. The ruleset handles no access to files, because a domain that does forbids every mount(2).

Needs Linux 6.12 (Landlock ABI 6), see landlock(7). Standard library only.
"""

import contextlib

from jobworker.sandbox import syscalls as sc

SCOPING_ABI = 6
GAP = (
    "abstract UNIX sockets: jobs on the host's network reach those of the host, since this "
    "kernel's Landlock cannot scope them (Linux 6.12 or newer, with landlock in lsm=)"
)


def open_scope() -> int | None:
    """A descriptor of the ruleset, close-on-exec, or None if the kernel cannot scope.

    One ruleset serves all jobs: each job that enters it gets a domain of its own.
    """
    with contextlib.suppress(OSError):
        if sc.landlock_abi() >= SCOPING_ABI:
            return sc.landlock_create_scope()
    return None
