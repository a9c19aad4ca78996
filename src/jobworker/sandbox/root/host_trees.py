"""Finds the host's directories that jobs see, and the files in them that jobs must not see.

A job's root user owns the host's programs inside the job, since it could install none otherwise. So
it could also read files below /usr that on the host only root may read. The launcher therefore
looks at its start for every name that not all users of the host may read, and hides it.

A mount below such a directory, such as /usr/local, is a tree of its own: an overlay does not show
the mounts in its layers, see overlayfs.rst.

Standard library only.
"""

import os
import stat
from collections.abc import Sequence

from jobworker.errors import HostUnsupported

MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def program_trees(programs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The directories to show jobs, and the links to make in their root, by name without slash.

    The directories are those of `programs` that exist, and /bin and the others of `MERGED`. On a
    host with a merged /usr (the usual case) the latter are links and stay links. Raises
    HostUnsupported if there is no directory to show.
    """
    trees = [path for path in programs if os.path.isdir(path)]
    links = {}
    for name in MERGED:
        path = f"/{name}"
        if os.path.islink(path):
            links[name] = os.readlink(path)
        elif os.path.isdir(path) and path not in trees:
            trees.append(path)
    if not trees:
        raise HostUnsupported(
            "cannot show jobs any programs: "
            + (f"none of {', '.join(programs)} is a directory" if programs else "none are named"),
            remedy="correct sandbox.programs in the configuration",
        )
    return trees, links


def with_mounts_below(trees: Sequence[str], mountinfo: str) -> list[str]:
    """`trees` and the mount points below them, sorted so that a directory precedes its content.

    `mountinfo` is the text of /proc/self/mountinfo, see proc_pid_mountinfo(5).
    """
    points = {line.split()[4].encode().decode("unicode_escape") for line in mountinfo.splitlines()}
    below = {
        point
        for point in points
        if os.path.isdir(point) and any(point.startswith(f"{tree}/") for tree in trees)
    }
    return sorted({*trees, *below})


def not_for_all(tree: str) -> list[str]:
    """The names below `tree`, relative to it, that some users of the host may not read.

    A directory that not every user may list and search stands for its whole content. Other file
    systems that are mounted below `tree` are left out. Raises OSError.
    """
    hidden: list[str] = []
    device = os.lstat(tree).st_dev
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        descriptor = os.open(
            f"{tree}/{directory}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        try:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        continue
                    status = entry.stat(follow_symlinks=False)
                    name = f"{directory}{entry.name}"
                    if not stat.S_ISDIR(status.st_mode):
                        if not status.st_mode & stat.S_IROTH:
                            hidden.append(name)
                    elif status.st_dev != device:
                        continue
                    elif status.st_mode & 0o5 != 0o5:
                        hidden.append(name)
                    else:
                        waiting.append(f"{name}/")
        except FileNotFoundError:
            pass
        finally:
            os.close(descriptor)
    return hidden
