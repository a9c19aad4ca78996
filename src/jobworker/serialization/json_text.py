"""JSON as text (RFC 8259), read strictly and written on one line.

The reader refuses duplicate keys in one object, NaN and Infinity. For a text from the network it
also bounds the depth and the number of values, and lets other threads run while it decodes a long
one.
"""

import json
import math

from jobworker.errors import MalformedJSON, shortened
from jobworker.serialization.json_decoder import CooperativeDecoder

_TOO_MANY_DIGITS = "integer string conversion"
"""What Python's refusal to convert more than 4,300 digits says, with advice for a programmer."""
MAX_DEPTH = 32
"""Levels of lists and objects in one message. The deepest message of the protocol has six."""
MAX_VALUES = 100_000
"""Values in one message: several times as many as a job may have arguments and variables."""


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shortened(repr(twice))} appears twice in one object")
    return made


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is out of range")
    return number


_decoder = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
)

LONG_CHARACTERS = 16_384
"""A longer text takes milliseconds to decode, so the service decodes it in a worker thread."""
MANY_CONTAINERS = 500
"""Lists and objects. To decode one costs as much as thirty characters or four other values."""


def takes_long(text: str | bytes) -> bool:
    """Whether a text takes milliseconds to decode."""
    if len(text) > LONG_CHARACTERS:
        return True
    if isinstance(text, bytes):
        return False
    return text.count("[") + text.count("{") + text.count(",") // 4 > MANY_CONTAINERS


def loads(text: str, *, bounded: bool = False) -> object:
    """Parse one JSON text. Raises MalformedJSON, which says what is wrong and where.

    `bounded` is for a text from the network: at most `MAX_DEPTH` levels and `MAX_VALUES` values,
    and other threads run while a long text is decoded.
    """
    try:
        if bounded and takes_long(text):
            return _patient_decoder(text).decode()
        value = _decoder.decode(text)
        if bounded and text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
        return value
    except RecursionError:
        raise MalformedJSON("cannot read the message: it is nested too deeply") from None
    except ValueError as error:
        why = "a number has too many digits" if _TOO_MANY_DIGITS in str(error) else error
        raise MalformedJSON(f"cannot read the message as JSON: {why}") from None


def _patient_decoder(text: str) -> CooperativeDecoder:
    return CooperativeDecoder(
        text=text,
        object_pairs_hook=_no_duplicates,
        parse_constant=_no_constant,
        parse_float=_finite,
        max_depth=MAX_DEPTH,
        max_values=MAX_VALUES,
    )


def _check_depth(value: object) -> None:
    """Raise ValueError if a value has more than `MAX_DEPTH` levels. Walks it level by level."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        level = [
            inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
        ]


def dumps(value: object) -> str:
    """Write plain `value` as one line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
