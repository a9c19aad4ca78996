"""What forbids user namespaces on this host, and the command that allows them.

The kernel says EPERM or ENOSPC for several different switches. These are read only once it has
refused, to name the one that stands in the way: what a switch says is no proof of anything.

Sources: namespaces(7), user_namespaces(7); Debian's kernel.unprivileged_userns_clone; Ubuntu's
kernel.apparmor_restrict_unprivileged_userns (23.10 and newer).

Standard library only.
"""

import os

ALLOW = "allow user namespaces on this host, and in the container around us if there is one"


def user_namespace_remedy(sysctls: str = "/proc/sys", *, root: bool | None = None) -> str:
    """The remedy for a refused user namespace; `root`: whether the right to all of them is ours."""
    if _read(sysctls, "user/max_user_namespaces") == "0":
        return "allow user namespaces: sysctl -w user.max_user_namespaces=65536"
    if os.geteuid() == 0 if root is None else root:
        return ALLOW
    if _read(sysctls, "kernel/unprivileged_userns_clone") == "0":
        return "allow them to ordinary users: sysctl -w kernel.unprivileged_userns_clone=1"
    if _read(sysctls, "kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "give this Python an AppArmor profile with the rule userns, or allow all: "
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return ALLOW


def _read(sysctls: str, name: str) -> str:
    try:
        with open(f"{sysctls}/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
