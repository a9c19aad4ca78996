"""Linux capabilities by their names: the numbers of linux/capability.h, see capabilities(7).

Only those stand here that this program names. What is dropped is dropped by number, up to `LAST`,
since a kernel may have capabilities that are newer than this list.

Standard library only.
"""

from enum import IntEnum

LAST = 63
"""The highest number that the kernel's sets have room for."""


class Capability(IntEnum):
    """A right that the kernel tells apart from being root."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    FOWNER = 3
    FSETID = 4
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    NET_BIND_SERVICE = 10
    NET_ADMIN = 12
    SYS_CHROOT = 18
    SYS_ADMIN = 21
    AUDIT_WRITE = 29
    SETFCAP = 31
