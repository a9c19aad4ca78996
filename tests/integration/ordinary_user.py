"""An ordinary user for the tests: who runs `worker`, in which control groups, with which ids.

Nothing of the host is changed. The user is a bare number, named by files that are mounted over the
host's in a mount namespace of its own. There also stands, at its place, what the user needs of
Python and the package and could not reach otherwise, such as below /root.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import apsw

import jobworker

UID = 54_321
FIRST_SUBUID, SUBUIDS = 700_000_000, 6_553_600
_IN_NAMESPACE = """
set -eu
site=$1 uid=$2; shift 2
number=0
for path in $NEEDED; do
    number=$((number + 1))
    mkdir -p "$site/$number"
    mount --bind "$path" "$site/$number"
done
for path in $CLOSED; do mount -t tmpfs -o mode=755 tmpfs "$path"; done
number=0
for path in $NEEDED; do
    number=$((number + 1))
    [ -d "$path" ] || mkdir -p "$path"
    mount --move "$site/$number" "$path"
done
for name in passwd subuid subgid; do
    [ -e "/etc/$name" ] && mount --bind "$site/etc/$name" "/etc/$name"
done
for group in $GROUPS_OF_USER; do echo $$ > "$group/cgroup.procs"; done
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups env -i HOME="$site/home" \\
    PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \\
    PYTHONPATH="$PYTHONPATH" "$PYTHON" "$@"
"""


def command(
    site: Path, arguments: Sequence[str], *, subuids: bool = False, groups: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """The command and environment by which the user runs `worker` with `arguments`.

    `site` is a directory that the user may pass through. `subuids`: it has a range of ids.
    `groups`: the control groups that it starts in.
    """
    for name in ("etc", "home"):
        (site / name).mkdir(exist_ok=True)
    os.chown(site / "home", UID, UID)
    entry = f"ordinary:x:{UID}:{UID}::{site}/home:/bin/sh\n"
    (site / "etc" / "passwd").write_text(Path("/etc/passwd").read_text() + entry)
    for name in ("subuid", "subgid"):
        text = f"ordinary:{FIRST_SUBUID}:{SUBUIDS}\n" if subuids else ""
        (site / "etc" / name).write_text(text)
    packages, source = (str(Path(m.__file__ or "").parent.parent) for m in (apsw, jobworker))
    needed = (sys.base_prefix, packages, source)
    closed = sorted(set(filter(None, map(_closed_above, needed))))
    environment = {
        "PATH": os.environ["PATH"],
        "NEEDED": " ".join(needed) if closed else "",
        "CLOSED": " ".join(closed),
        "PYTHON": f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}",
        "PYTHONPATH": f"{source}:{packages}",
        "GROUPS_OF_USER": " ".join(groups),
    }
    code = "from jobworker.cli.worker.main import main; main()"
    script = ["sh", "-c", _IN_NAMESPACE, "sh", str(site), str(UID), "-c", code, *arguments]
    return ["unshare", "--mount", "--propagation=private", *script], environment


def _closed_above(path: str) -> str | None:
    """The topmost directory on the way to `path` that not every user may pass."""
    ways = [*reversed(Path(path).parents), Path(path)]
    return next((str(way) for way in ways if not way.stat().st_mode & 0o001), None)


def can_have_subuids() -> bool:
    """Whether this host has newuidmap(1) and the files that it reads."""
    return shutil.which("newuidmap") is not None and Path("/etc/subuid").exists()


@contextlib.contextmanager
def delegated_groups(name: str) -> Iterator[list[str]]:
    """Control groups that belong to the user, one in each hierarchy, as systemd would delegate."""
    made: list[str] = []
    try:
        for top in hierarchies():
            group = f"{top}/{name}"
            os.mkdir(group)
            made.append(group)
            _give(group)
        yield made
    finally:
        for group in made:
            for below in sorted(Path(group).rglob("*"), reverse=True):
                if below.is_dir():
                    below.rmdir()
            os.rmdir(group)


def hierarchies() -> list[str]:
    """Where control groups are mounted: cgroup2, and v1 hierarchies of the controllers in use."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        wanted = {"cpu", "cpuacct", "memory", "blkio", "pids"} & set(options.split(","))
        if kind == "cgroup2" or (kind == "cgroup" and wanted):
            found.append(before.split()[4])
    return found


def _give(group: str) -> None:
    if Path(f"{group}/cgroup.controllers").exists():
        os.setxattr(group, "user.delegate", b"1")
    for path in (group, *(f"{group}/{file}" for file in _DELEGATED)):
        with contextlib.suppress(FileNotFoundError):
            os.chown(path, UID, UID)


_DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "tasks")
"""What systemd hands over with a group: "Delegation", Documentation/admin-guide/cgroup-v2.rst."""
