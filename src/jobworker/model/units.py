"""Parse and format durations and sizes in the form that people write."""

import re
from datetime import UTC, datetime, timedelta

from jobworker.errors import shortened

_DURATION = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")

MAX_DURATION_SECONDS = 10 * 365 * 86400.0
"""Ten years: a longer duration is a mistake, and would overflow timers."""


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as "90", "1.5", "500ms", "10s", "1h30m", "2d".

    Raises ValueError for other text, and for more than ten years.
    """
    words = text.strip()
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", words):
        seconds = float(words)
    else:
        parts = _DURATION_PART.findall(words)
        if not parts or "".join(number + unit for number, unit in parts) != words:
            raise ValueError(f"{shortened(text)!r} is not a duration such as 90s, 10m or 1h30m")
        seconds = sum(float(number) * _DURATION[unit] for number, unit in parts)
    if seconds > MAX_DURATION_SECONDS:
        raise ValueError(f"{shortened(text)!r} is longer than ten years")
    return seconds


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def nanoseconds(moment: datetime) -> int:
    """Return nanoseconds since the epoch, exactly: a float would lose digits."""
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def from_nanoseconds(time_ns: int) -> datetime:
    """Return the time `time_ns` nanoseconds after the epoch, rounded down to a microsecond."""
    return _EPOCH + timedelta(microseconds=time_ns // 1000)


def format_duration(seconds: float) -> str:
    """Format seconds in at most two units, such as "350ms", "12.3s", "4m10s", "2h5m", "3d1h"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for (large, large_seconds), (small, small_seconds) in (
        (("m", 60), ("s", 1)),
        (("h", 3600), ("m", 60)),
        (("d", 86400), ("h", 3600)),
    ):
        if whole < large_seconds * (60 if large == "m" else 24) or large == "d":
            rest = whole % large_seconds // small_seconds
            return f"{whole // large_seconds}{large}" + (f"{rest}{small}" if rest else "")
    raise AssertionError("the table ends with days")


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]i?B?|B)?", re.IGNORECASE)
_SIZE_UNITS = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_UNITS = {0: "B", 10: "KiB", 20: "MiB", 30: "GiB", 40: "TiB"}


def parse_size(text: str, *, alone: str = "B") -> int:
    """Return the bytes of a size such as "4096", "500K", "64Mi", "1.5GiB"; units are binary.

    `alone` is the unit of a number without one: B, K, M, G or T. Raises ValueError for other text,
    and for more than 1024 TiB.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{shortened(text)!r} is not a size such as 500K, 64M or 2G")
    size = float(found[1]) * (1 << _SIZE_UNITS[(found[2] or alone)[0].upper()])
    if size > 1 << 50:
        raise ValueError(f"{shortened(text)!r} is more than 1024T")
    return int(size)


MEBIBYTE = 1 << 20


def format_mebibytes(count: int) -> str:
    """Format `count` bytes in MiB, the unit of limits, rounded up: "64 MiB", "64.1 MiB".

    So a size above a limit never looks equal to it.
    """
    tenths = -(-count * 10 // MEBIBYTE)
    return f"{tenths // 10}.{tenths % 10} MiB".replace(".0 ", " ")


def format_limit(count: int) -> str:
    """Format `count` bytes exactly, for a bound: "512 MiB", "1 GiB", "1100 MiB", "1500 B".

    The unit is the largest binary one in which the number is whole.
    """
    shift = max(n for n in _UNITS if count % (1 << n) == 0) if count else 0
    return f"{count >> shift} {_UNITS[shift]}"


def format_size(count: float) -> str:
    """Format `count` bytes in binary units with one decimal: "512 B", "1.5 KiB", "64.0 MiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            return f"{count:.1f} {unit}"
    raise AssertionError("the list ends with TiB")
