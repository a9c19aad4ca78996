"""Finds the setting that forbids user namespaces on this host, and the command that allows them.

The kernel answers EPERM or ENOSPC for several different settings. The launcher reads them only
after such an answer, to name the one that is the cause. Reading a setting before would prove
nothing: the kernel may refuse for another reason.

Sources: namespaces(7), user_namespaces(7); Debian's kernel.unprivileged_userns_clone; Ubuntu's
kernel.apparmor_restrict_unprivileged_userns (23.10 and newer).

Standard library only.
"""

import os

ALLOW = "allow user namespaces on this host, and in the service's container if there is one"


def user_namespace_remedy(sysctls: str = "/proc/sys", *, root: bool | None = None) -> str:
    """The remedy for a user namespace that the kernel has refused.

    `sysctls` is the directory of the settings. `root` is whether this process has root's rights;
    None reads its user id.
    """
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
