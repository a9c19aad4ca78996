"""The numbers of Linux capabilities by name: linux/capability.h, see capabilities(7).

The list has only the capabilities that this program names. Others are dropped by number, up to
`LAST`, since a kernel may have capabilities that are newer than this list.

Standard library only.
"""

from enum import IntEnum

LAST = 63
"""The highest number that fits in the kernel's capability sets, which have 64 bits."""


class Capability(IntEnum):
    """A part of root's rights that a process can have without the others."""

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
