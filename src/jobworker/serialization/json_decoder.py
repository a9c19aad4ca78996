"""A JSON decoder for long texts that lets other threads run while it works.

CPython's own decoder holds the global interpreter lock (GIL) while it decodes: a tenth of a second
for a few megabytes, in which no other thread runs, not even the event loop's. This decoder walks
lists and objects in Python and calls C only for short parts: strings, piece by piece, and runs of
up to 64 plain values. So Python can release the lock many times in a millisecond.

The decoder counts values and levels, and stops at the first that is too many. It accepts and
refuses the same texts as `json.JSONDecoder` (RFC 8259), and calls the same hooks.
"""

import re
from collections.abc import Callable
from json import JSONDecodeError, JSONDecoder
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from attrs import define, field

FIRST_PIECE = 4096
ESCAPE_CHARACTERS = 12
"""The longest escape of one character: two UTF-16 units, such as `\\ud83d\\ude00`."""
MAX_STRING_CHARACTERS = 6 * 131_072
"""The longest string, as written: a job's longest argument (128 KiB), each character escaped."""

_SPACE = re.compile(r"[ \t\n\r]*+")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*+))(\.[0-9]++)?([eE][-+]?[0-9]++)?")
_WORDS = {"null": None, "true": True, "false": False}
_WORD = re.compile(r"null|true|false")
_CONSTANT = re.compile(r"NaN|Infinity|-Infinity")

_SHORT_STRING = (
    r'"[^"\\\x00-\x1f]{0,200}+'
    r'(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]{0,20}+){0,8}+"'
)
_PLAIN = (
    rf"[ \t\n\r]{{0,9}}+(?:{_SHORT_STRING}|-?(?:0|[1-9][0-9]{{0,30}}+)"
    r"(?:\.[0-9]{1,30}+)?+(?:[eE][-+]?[0-9]{1,30}+)?+|null|true|false|\[\])[ \t\n\r]{0,9}+,"
)
_PLAIN_VALUES = re.compile(rf"(?:{_PLAIN}){{2,64}}+")
_PLAIN_PAIRS = re.compile(
    rf"(?:[ \t\n\r]{{0,9}}+{_SHORT_STRING}[ \t\n\r]{{0,9}}+:{_PLAIN}){{2,64}}+"
)
"""Matches 2 to 64 entries of a list or an object that C decodes in one call, each with its comma.
Most entries of most texts match. The only fault that such an entry can have is a number that is out
of range."""


@define(eq=False, kw_only=True)
class CooperativeDecoder:
    """A decoder of one text; `decode` is called once."""

    text: str
    object_pairs_hook: Callable[[list[tuple[str, object]]], object]
    parse_constant: Callable[[str], object]
    parse_float: Callable[[str], float]
    max_depth: int
    max_values: int
    _place: int = field(default=0, init=False)
    _depth: int = field(default=0, init=False)
    _values: int = field(default=0, init=False)

    _values_decoder: JSONDecoder = field(init=False)
    _pairs_decoder: JSONDecoder = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._values_decoder = JSONDecoder(parse_float=self.parse_float)
        self._pairs_decoder = JSONDecoder(parse_float=self.parse_float, object_pairs_hook=list)

    def decode(self) -> Any:
        """Return the text's value. Raises ValueError, which names the fault and its position."""
        value = self._value()
        if self._next():
            raise self._fault("Extra data")
        return value

    def _next(self) -> str:
        """Skip white space and return the next character without consuming it; "" at the end."""
        found = _SPACE.match(self.text, self._place)
        assert found is not None
        self._place = found.end()
        return self.text[self._place : self._place + 1]

    def _fault(self, what: str) -> JSONDecodeError:
        return JSONDecodeError(what, self.text, self._place)

    def _count(self, values: int) -> None:
        self._values += values
        if self._values > self.max_values:
            raise ValueError(f"it holds more than {self.max_values} values")

    def _several(self, shape: re.Pattern[str], decoder: JSONDecoder, form: str) -> list[Any]:
        """Decode and consume the entries that match `shape`, each with its comma; maybe none."""
        found = None if self._depth >= self.max_depth else shape.match(self.text, self._place)
        if found is None:
            return []
        made: list[Any] = decoder.decode(f"{form[0]}{found[0][:-1]}{form[1]}")
        self._count(len(made))
        self._place = found.end()
        return made

    def _value(self) -> object:
        self._count(1)
        first = self._next()
        if first == '"':
            return self._string()
        if first and first in "[{":
            self._depth += 1
            if self._depth > self.max_depth:
                raise ValueError(f"it is nested deeper than {self.max_depth} levels")
            self._place += 1
            made = self._list() if first == "[" else self._object()
            self._depth -= 1
            return made
        return self._plain()

    def _list(self) -> list[object]:
        made: list[object] = []
        if self._next() == "]":
            self._place += 1
            return made
        while True:
            made += self._several(_PLAIN_VALUES, self._values_decoder, "[]")
            made.append(self._value())
            if not self._goes_on("]"):
                return made

    def _object(self) -> object:
        pairs: list[tuple[str, object]] = []
        if self._next() == "}":
            self._place += 1
            return self.object_pairs_hook(pairs)
        while True:
            pairs += self._several(_PLAIN_PAIRS, self._pairs_decoder, "{}")
            if self._next() != '"':
                raise self._fault("Expecting property name enclosed in double quotes")
            name = self._string()
            if self._next() != ":":
                raise self._fault("Expecting ':' delimiter")
            self._place += 1
            pairs.append((name, self._value()))
            if not self._goes_on("}"):
                return self.object_pairs_hook(pairs)

    def _goes_on(self, end: str) -> bool:
        """Consume a comma and return True, or consume the character `end` and return False."""
        found = self._next()
        if found not in (",", end):
            raise self._fault("Expecting ',' delimiter")
        self._place += 1
        return found == ","

    def _string(self) -> str:
        """Decode a string: try larger and larger pieces of the text until one contains its end.

        The scan is C code and holds the lock, so a string longer than `MAX_STRING_CHARACTERS` is
        refused instead of scanned to its end.
        """
        start, size = self._place + 1, FIRST_PIECE
        while True:
            piece = self.text[start : start + size]
            try:
                value, used = scanstring(piece, 0, True)
            except JSONDecodeError as fault:
                # A fault near the end of a piece may only mean that the piece was cut there.
                whole = len(piece) < size or fault.pos + ESCAPE_CHARACTERS < size
                if (whole and "Unterminated" not in fault.msg) or len(piece) < size:
                    raise JSONDecodeError(fault.msg, self.text, start + fault.pos) from None
                if size >= MAX_STRING_CHARACTERS:
                    raise ValueError(
                        f"a string in it has more than {MAX_STRING_CHARACTERS} characters"
                    ) from None
                size = min(8 * size, MAX_STRING_CHARACTERS)
            else:
                self._place = start + used
                return str(value)

    def _plain(self) -> object:
        if (word := _WORD.match(self.text, self._place)) is not None:
            self._place = word.end()
            return _WORDS[word[0]]
        if (constant := _CONSTANT.match(self.text, self._place)) is not None:
            return self.parse_constant(constant[0])
        number = _NUMBER.match(self.text, self._place)
        if number is None:
            raise self._fault("Expecting value")
        self._place = number.end()
        return self.parse_float(number[0]) if number[2] or number[3] else int(number[1])
