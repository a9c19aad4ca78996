"""What may be the name of a runtime or volume, and where in a job's root a volume may stand.

Pure, standard library only: the service checks what clients say by it, and the launcher checks
again what the service says.
"""

import re

MIN_DISK_BYTES = 16 << 20
"""The smallest file system that is worth the name."""
MAX_DISK_BYTES = 1 << 44
"""The largest that ext4 has with 32-bit block numbers."""
MAX_VOLUMES = 16
MAX_PATH_BYTES = 1024

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_NAME = re.compile(NAME_PATTERN)
_NEVER_BELOW = ("/proc", "/sys", "/dev")
_NEVER_AT = frozenset("/bin /sbin /lib /lib32 /lib64 /libx32 /usr /etc /var /run".split())


def name_fault(name: str) -> str | None:
    """Say why `name` can be none; None if it can."""
    if _NAME.fullmatch(name):
        return None
    return (
        f"{name!r} is no name: letters, digits, '.', '_' and '-', at most 63, "
        "the first a letter or digit"
    )


def place_fault(path: str) -> str | None:  # noqa: PLR0911 - a list of refusals
    """Say why a volume cannot stand at `path`; None if it can."""
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
    """Where a volume stands if nothing else is said."""
    return f"/volumes/{name}"
