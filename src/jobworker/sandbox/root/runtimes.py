"""Runtimes: root trees that jobs can ask for instead of the host's programs.

An administrator makes a tree, for example by debootstrap(8), and names it in the configuration. It
becomes the lowest layer of the root of a job that asks for it, with the ids of the job's range. The
launcher puts a layer of its own above it, with the directories that the sandbox mounts on, and with
the host's /etc/hosts and /etc/resolv.conf, which a tree cannot have in advance. Jobs do not see
what is mounted below a tree.

Standard library only.
"""

import os
from collections.abc import Mapping, Sequence

from jobworker.errors import ConfigError
from jobworker.sandbox.root.etc_snapshot import EtcEntry, write_entry
from jobworker.sandbox.root.stage import make_mount_points
from jobworker.sandbox.start.plan import Layer, RootView

FROM_THE_HOST = ("/etc/hosts", "/etc/resolv.conf")


def check_trees(runtimes: Mapping[str, str]) -> None:
    """Raise ConfigError for the first runtime that is missing or no root tree."""
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


def lay_over(place: str, entries: Sequence[EtcEntry]) -> None:
    """Fill the empty directory `place` with the layer that lies above every runtime's tree."""
    make_mount_points(place)
    for entry in entries:
        if entry.path in FROM_THE_HOST and entry.content is not None:
            write_entry(place + entry.path, entry)


def view_of(base: str, over: str, tree: str) -> RootView:
    """The view of a runtime: the mount at `tree`, and above it the directory `over` in `base`."""
    return RootView("/dev/null", (base, tree), (Layer("", (over, tree)),))
