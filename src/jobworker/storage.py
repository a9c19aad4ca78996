"""Names of runtimes and volumes, places of volumes in a job's root, and bounds on sizes.

Pure, standard library only: the service checks the requests of clients with these functions, and
the launcher checks the requests of the service with them again.
"""

import re

MIN_DISK_BYTES = 16 << 20
"""16 MiB, the smallest disk or volume that a job may ask for."""
MIN_MEMORY_BYTES = 4 << 20
"""The smallest memory limit. A new job has some 230 KB of memory before it has its limit: with less
room the kernel reclaims for as long as the launcher writes the limit."""
MAX_DISK_BYTES = 1 << 44
"""16 TiB, the largest ext4 with 32-bit block numbers, at blocks of 4 KiB."""
MAX_VOLUMES = 16
MAX_PATH_BYTES = 1024

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_NAME = re.compile(NAME_PATTERN)
_NEVER_BELOW = ("/proc", "/sys", "/dev")
_NEVER_AT = frozenset("/bin /sbin /lib /lib32 /lib64 /libx32 /usr /etc /var /run".split())


def name_fault(name: str) -> str | None:
    """Return why `name` is not allowed for a runtime or volume; None if it is allowed."""
    if _NAME.fullmatch(name):
        return None
    return (
        f"{name!r} is no name: letters, digits, '.', '_' and '-', at most 63, "
        "the first a letter or digit"
    )


def place_fault(path: str) -> str | None:  # noqa: PLR0911 - a list of refusals
    """Return why a volume cannot be mounted at `path`; None if it can."""
    if not path.startswith("/") or "\0" in path:
        return f"must be an absolute path, not {path!r}"
    if path == "/":
        return "must not cover the whole root"
    if any(part in ("", ".", "..") for part in path[1:].split("/")):
        return f"must be a path without '.', '..' and empty parts, not {path!r}"
    if len(path.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    for covered in _NEVER_BELOW:
        if path == covered or path.startswith(f"{covered}/"):
            return f"must not lie at or below {covered}, which belongs to the sandbox"
    if path in _NEVER_AT:
        return f"must not cover {path}, which programs need"
    return None


def default_place(name: str) -> str:
    """The path at which a volume is mounted if the request names none."""
    return f"/volumes/{name}"
