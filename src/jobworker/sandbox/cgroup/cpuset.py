"""The cores that a job may run on: the cpuset controller, used wherever the host offers it.

It is in no configuration: where it is missing nothing else changes, and only a job that asks for
cores is refused, by its name. Documentation/admin-guide/cgroup-v1/cpusets.rst and cgroup-v2.rst:

- v1: a group without cores or memory nodes takes no process. Our directory copies both from the
  group above, and those below copy them from it at their creation (cgroup.clone_children).
- v2: a list that names more than the group above has is taken, and the rest of it then ignored. So
  what is effective is read back.
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
    """Our directory in the v1 hierarchy, ready for scopes: its path, and a descriptor of it.

    None where the host does not offer it.
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
    """Bind the scope `name` to `cores`, or to all that are `there` for "". Raises SandboxError."""
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
