"""Transform a job's bytes for a person: make control characters visible, add times to lines."""

import codecs
import re
from datetime import UTC, datetime


class TerminalFilter:
    """Makes control characters visible, except line ends and tabs.

    Control characters of ISO 6429 (C0, DEL and C1) become `\\x1b` and the like. So do bytes that
    are not UTF-8, and a carriage return without a line feed, because it would overwrite the line.
    Marks that change the direction of text (Unicode, annex 9) become `\\u202e` and the like. A
    character may be split over several pieces.
    """

    _ACTS = re.compile(
        "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)"
    )

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._held = ""

    def feed(self, data: bytes, *, final: bool = False) -> bytes:
        """Return the visible form of the next piece; the end may be held back for the next one."""
        text = self._held + self._decoder.decode(data, final)
        self._held = "\r" if text.endswith("\r") and not final else ""
        text = text.removesuffix(self._held)
        return self._ACTS.sub(lambda found: _visible(found[0]), text).encode()


def _visible(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class LineStamper:
    """Begins each line of one stream with the time of its first byte (RFC 3339, UTC)."""

    def __init__(self) -> None:
        self._within = False

    def feed(self, data: bytes, time: datetime) -> bytes:
        """Return the next piece, which must not be empty, with the times of its lines."""
        moment = time.astimezone(UTC).isoformat(timespec="microseconds")
        stamp = moment.replace("+00:00", "Z ").encode("ascii")
        *lines, rest = data.split(b"\n")
        stamped = [line + b"\n" for line in lines] + ([rest] if rest else [])
        first = b"" if self._within else stamp
        self._within = bool(rest)
        return first + stamp.join(stamped)
