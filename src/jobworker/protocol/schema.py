"""Make the JSON Schema (2020-12) of message classes: types, bounds, enumerations, descriptions.

All of it comes from the attrs classes that decode messages: types from annotations, bounds from
validators (`model.bounds`), defaults from fields, descriptions from the docstrings of classes and
the strings below fields. Python does not keep these strings at run time, so this module reads them
from the source; a package without its source has schemas without descriptions.

Each class becomes an entry of `definitions`, which others refer to by name.
"""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

import attrs

from jobworker.serialization.convert import unstructure

Schema = dict[str, object]

REFERENCE = "#/components/schemas/"

_PLAIN: dict[object, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    NoneType: {"type": "null"},
    object: {},
    datetime: {"type": "string", "format": "date-time"},
}


class Schemas:
    """A set of schemas that refer to each other by name; each is made at its first use."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def of(self, kind: Any) -> Schema:
        """Return the schema of a type, or a reference to it. Raises TypeError for other types."""
        if isinstance(kind, NewType):
            kind = kind.__supertype__
        if kind in _PLAIN:
            return dict(_PLAIN[kind])
        if isinstance(kind, type) and (attrs.has(kind) or issubclass(kind, Enum)):
            if kind.__name__ not in self.definitions:
                self.definitions[kind.__name__] = {}  # stops recursion
                self.definitions[kind.__name__] = self._named(kind)
            return {"$ref": REFERENCE + kind.__name__}
        made = self._generic(get_origin(kind), get_args(kind))
        if made is None:
            raise TypeError(f"no schema is known for {kind!r}")
        return made

    def _generic(self, origin: Any, arguments: tuple[Any, ...]) -> Schema | None:
        if origin in (Union, UnionType):
            return {"anyOf": [self.of(argument) for argument in arguments]}
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (tuple, list, frozenset):
            return {"type": "array", "items": self.of(arguments[0])}
        if origin in (dict, Mapping):
            return {"type": "object", "additionalProperties": self.of(arguments[1])}
        return None

    def _named(self, cls: Any) -> Schema:
        words = field_descriptions(cls)
        if issubclass(cls, Enum):
            values = [member.value for member in cls]
            members = [f"`{member.value}`: {words[member.name]}" for member in cls if words]
            return _described({"enum": values}, " ".join([first_line(cls), *members]))
        types = get_type_hints(cls)
        properties, required = {}, []
        for attribute in attrs.fields(cls):
            schema = self.of(types[attribute.name])
            _add_bounds(schema, attribute.validator)
            if attribute.default is attrs.NOTHING:
                required.append(attribute.name)
            else:
                schema["default"] = default_of(attribute)
            properties[attribute.name] = _described(schema, words.get(attribute.name, ""))
        made: Schema = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        return _described(made, first_line(cls))


def default_of(attribute: "attrs.Attribute[Any]") -> object:
    """The default of a field, as a plain value."""
    default = attribute.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()  # type: ignore[union-attr]
    return unstructure(default)


def first_line(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def field_descriptions(cls: type) -> Mapping[str, str]:
    """The string below each field (or member), by name; empty without the source."""
    node = _classes_in(cls.__module__).get(cls.__qualname__)
    if node is None:
        return {}
    return {name: " ".join(text.split()) for name, text in _strings_below(node)}


@cache
def _classes_in(module: str) -> Mapping[str, ast.ClassDef]:
    """The classes of a module as its source has them, parsed once for all of them."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _strings_below(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, after in zip(node.body, node.body[1:], strict=False):
        match statement, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, text


def _described(schema: Schema, words: str) -> Schema:
    return {"description": words, **schema} if words else schema


def _add_bounds(schema: Schema, validator: object) -> None:
    """Add the validators' bounds to a schema; if it also allows null, to the other alternative."""
    for each in getattr(validator, "_validators", (validator,)):
        stated = getattr(each, "schema", {})
        inner = schema.get("anyOf")
        place = inner[0] if isinstance(inner, list) and isinstance(inner[0], dict) else schema
        for keyword, value in stated.items():
            known = place.get(keyword)
            place[keyword] = {**known, **value} if isinstance(known, dict) else value
