"""Limits the cores that a job may run on, by the cpuset controller, if the host offers it.

No configuration names this controller. On a host without it, only a job that asks for cores is
refused, with the name of the controller. The two versions differ
(Documentation/admin-guide/cgroup-v1/cpusets.rst and cgroup-v2.rst):

- v1: a group without cores or memory nodes accepts no process. So our directory copies both from
  the group above, and the scopes copy them at their creation (cgroup.clone_children).
- v2: the kernel accepts cores that the group above does not have, and ignores them. So the
  effective cores are read back.
"""

import contextlib
import os

from jobworker import errors
from jobworker.core_list import parse_cores
from jobworker.sandbox.cgroup import files, mounts

CONTROLLER = "cpuset"
_CORES = "cpuset.cpus"
EFFECTIVE = {False: "cpuset.effective_cpus", True: "cpuset.cpus.effective"}


def open_v1(found: mounts.Hierarchies, name: str, parent: str) -> tuple[str, int] | None:
    """The path and a descriptor of our directory in the v1 hierarchy, which is ready for scopes.

    Returns None if the host does not offer the controller.
    """
    mount = found.legacy(CONTROLLER)
    if mount is None:
        return None
    path = f"{mounts.base_path(found, mount, CONTROLLER, parent)}/{name}"
    try:
        top = mounts.make_directory(path)
    except errors.HostUnsupported:
        return None
    try:
        for kind, source in (("cpus", "effective_cpus"), ("mems", "effective_mems")):
            with open(f"{os.path.dirname(path)}/cpuset.{source}", encoding="ascii") as above:
                files.write(top, f"cpuset.{kind}", above.read().strip())
        files.write(top, "cgroup.clone_children", "1")
    except OSError:
        mounts.discard(path, top)
        return None
    return path, top


def limit_cores(top: int, name: str, cores: str, there: str, *, v2: bool) -> None:
    """Bind the scope `name` to `cores`; "" is all cores.

    `there`: the cores of our directory, such as "0-3". Raises SandboxError if a core is not among
    them or the kernel uses others, and OSError.
    """
    missing = parse_cores(cores) - parse_cores(there)
    if missing:
        raise files.refused(
            f"{name}/{_CORES}", cores, f"the cores here are {there}", "choose among them"
        )
    wanted = parse_cores(cores or there)
    files.set_limit(
        top, f"{name}/{_CORES}", cores or there, lambda kept: parse_cores(kept) == wanted
    )
    if v2:
        effective = files.read(top, f"{name}/{EFFECTIVE[v2]}").strip()
        with contextlib.suppress(ValueError):
            if parse_cores(effective) == wanted:
                return
        raise files.refused(f"{name}/{_CORES}", cores, f"the kernel uses {effective!r}")
