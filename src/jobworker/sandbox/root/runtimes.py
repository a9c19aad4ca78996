"""Root trees other than the host's programs: made by debootstrap(8), say, and named by an admin.

A tree is shown to jobs as the lower layer of their own root, with the ids of their range, and above
it a layer of ours: the directories that the sandbox mounts upon, and the host's names and
resolver, which no tree can know. What is mounted below a tree is not shown.

Standard library only.
"""

import os
from collections.abc import Mapping, Sequence

from jobworker.errors import ConfigError
from jobworker.sandbox.root.etc_snapshot import Entry, write_entry
from jobworker.sandbox.root.stage import make_mount_points
from jobworker.sandbox.start.plan import Layer, View

FROM_THE_HOST = ("/etc/hosts", "/etc/resolv.conf")


def check_trees(runtimes: Mapping[str, str]) -> None:
    """Raise ConfigError for the first that is missing or no root tree."""
    for name, path in runtimes.items():
        if not os.path.isdir(path):
            raise _unusable(name, path, "there is no such directory")
        if os.path.realpath(path) == "/":
            raise _unusable(name, path, "it is the host's own root")
        shells = (f"{path}/bin/sh", f"{path}/usr/bin/sh")
        if not any(os.path.lexists(shell) for shell in shells):
            raise _unusable(
                name, path, "it is no root tree: it holds neither bin/sh nor usr/bin/sh"
            )


def _unusable(name: str, path: str, why: str) -> ConfigError:
    return ConfigError(
        f"cannot use the runtime {name} at {path}: {why}",
        remedy=f"make the tree (debootstrap, mmdebstrap), or correct the key runtimes.{name}.path",
    )


def lay_over(place: str, entries: Sequence[Entry]) -> None:
    """Make the layer that stands above every tree, in an empty directory."""
    make_mount_points(place)
    for entry in entries:
        if entry.path in FROM_THE_HOST and entry.content is not None:
            write_entry(place + entry.path, entry)


def view_of(base: str, over: str, tree: str) -> View:
    """A root of the mount at `tree` with the directory `over` of the mount `base` above it."""
    return View("/dev/null", (base, tree), (Layer("", (over, tree)),))
