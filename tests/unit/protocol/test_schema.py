"""The schemas say what the decoder does: types, bounds, defaults and words."""

from enum import Enum
from typing import NewType

import pytest
from attrs import field, frozen

from jobworker.errors import error_classes
from jobworker.model.bounds import states, within
from jobworker.protocol.discovery import describe
from jobworker.protocol.methods import METHODS, NOTIFICATIONS
from jobworker.protocol.schema import REFERENCE, Schemas

Number = NewType("Number", int)


class Colour(Enum):
    """A colour."""

    RED = "red"
    """As blood."""


@states(maxItems=3, items={"maxLength": 5})
def _few(_: object, __: object, value: tuple[str, ...]) -> None:
    assert len(value) <= 3


@frozen(kw_only=True)
class Thing:
    """A thing.

    And more.
    """

    number: Number | None = field(default=None, validator=within(1, 9, or_zero=True))
    """How many."""
    words: tuple[str, ...] = field(validator=_few)
    colour: Colour = Colour.RED
    parts: "tuple[Thing, ...]" = ()


def test_class_is_described_by_its_fields() -> None:
    schemas = Schemas()
    assert schemas.of(Thing) == {"$ref": REFERENCE + "Thing"}
    assert schemas.definitions["Colour"] == {
        "description": "A colour. `red`: As blood.",
        "enum": ["red"],
    }
    bounds = {"anyOf": [{"const": 0}, {"minimum": 1, "maximum": 9}]}
    assert schemas.definitions["Thing"] == {
        "description": "A thing.",
        "type": "object",
        "properties": {
            "number": {
                "description": "How many.",
                "anyOf": [{"type": "integer", **bounds}, {"type": "null"}],
                "default": None,
            },
            "words": {
                "type": "array",
                "items": {"type": "string", "maxLength": 5},
                "maxItems": 3,
            },
            "colour": {"$ref": REFERENCE + "Colour", "default": "red"},
            "parts": {"type": "array", "items": {"$ref": REFERENCE + "Thing"}, "default": []},
        },
        "required": ["words"],
        "additionalProperties": False,
    }


def test_type_without_a_schema_is_named() -> None:
    with pytest.raises(TypeError, match="complex"):
        Schemas().of(complex)


def _references(value: object) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*map(_references, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_references, value))
    return set()


def test_document_describes_every_row_and_refers_to_nothing_that_it_lacks() -> None:
    made = describe("1.2.3")
    assert [method["name"] for method in made.methods] == list(METHODS)
    assert [note["name"] for note in made.info["x-notifications"]] == list(NOTIFICATIONS)  # type: ignore[attr-defined]
    assert [error["code"] for error in made.info["x-errors"]] == sorted(error_classes())  # type: ignore[attr-defined]
    schemas = made.components["schemas"]
    assert isinstance(schemas, dict)
    assert all(schemas.values())
    named = _references([made.methods, made.info, schemas])
    assert named <= {REFERENCE + name for name in schemas}
