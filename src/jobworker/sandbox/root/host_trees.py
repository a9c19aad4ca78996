"""The directories of the host that jobs are shown: which they are, and what in them is hidden.

A job's root user is to be the owner of the host's programs, or it could install none. But then it
could also read what on the host only root may, wherever that lies below /usr. So every name
that not all users of the host may read is looked for at the start, and hidden.

A mount below such a directory (/usr/local, say) is a tree of its own: an overlay shows nothing of
the mounts in its layers, see overlayfs.rst.

Standard library only.
"""

import os
import stat
from collections.abc import Sequence

from jobworker.errors import HostUnsupported

MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def program_trees(programs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The directories to show, and the links to make: (`programs` and /bin… , links).

    On a host with a merged /usr (the usual case) /bin is a link and stays one.
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
    """`trees` and the mount points below them, from the text of /proc/self/mountinfo (proc(5)).

    Each comes before what lies in it.
    """
    points = {line.split()[4].encode().decode("unicode_escape") for line in mountinfo.splitlines()}
    below = {
        point
        for point in points
        if os.path.isdir(point) and any(point.startswith(f"{tree}/") for tree in trees)
    }
    return sorted({*trees, *below})


def not_for_all(tree: str) -> list[str]:
    """What below `tree` some users of the host may not read: names relative to it.

    A directory that not everyone may list and pass stands for all that is in it. Other file
    systems mounted below are passed over. Raises OSError.
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
