"""Convert plain values, as JSON has them, to attrs classes and back, without changing a type.

By default, cattrs turns "5" into 5, "false" into True and "abc" into ('a', 'b', 'c'). For the
arguments of a job that is a security hole, so one hardened converter serves the whole project:

- exact types: an int is an int (True is not), a float may be written as an int, a string is a
  string of Unicode scalar values (no lone surrogates), a list never comes from a string;
- unknown keys are refused, and every fault is reported with the path of its value.

The module knows no class of the project. A class states its bounds as attrs validators, which raise
ValueError or TypeError.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any, TypeVar, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    ForbiddenExtraKeysError,
    IterableValidationNote,
)

from jobworker.errors import InvalidParams, shortened
from jobworker.serialization import exact
from jobworker.serialization.json_text import MAX_DEPTH

T = TypeVar("T")

MAX_REPORTED_FAULTS = 20


def _is_literal(cls: Any) -> bool:
    return str(get_origin(cls)) == "typing.Literal"


def _is_tuple(cls: Any) -> bool:
    return get_origin(cls) is tuple


def _is_mapping(cls: Any) -> bool:
    return get_origin(cls) in (dict, Mapping)


def _each(
    cls: Any, items: Iterable[tuple[Any, object]], plain: Any, kind: Any
) -> list[tuple[Any, Any]]:
    """Structure the value at each place; stop after `MAX_REPORTED_FAULTS` faults.

    cattrs itself would go on to the end and make an exception for each of a client's values.
    """
    made, faults = [], list[Exception]()
    for place, value in items:
        try:
            made.append((place, plain(value, kind)))
        except Exception as fault:  # noqa: BLE001 - whatever a hook raises is the value's fault
            fault.add_note(IterableValidationNote("", place, kind))
            faults.append(fault)
            if len(faults) >= MAX_REPORTED_FAULTS:
                break
    if faults:
        raise cattrs.IterableValidationError("", faults, cls)
    return made


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    converter.register_structure_hook(int, exact.integer)
    converter.register_structure_hook(float, exact.number)
    converter.register_structure_hook(bool, exact.boolean)
    converter.register_structure_hook(str, exact.string)
    converter.register_structure_hook(datetime, exact.moment)
    converter.register_structure_hook_func(lambda cls: cls is object, lambda value, _: value)
    converter.register_structure_hook_func(
        lambda cls: isinstance(cls, type) and issubclass(cls, Enum), exact.member
    )
    converter.register_structure_hook_func(_is_literal, exact.literal)

    @converter.register_structure_hook_factory(_is_tuple)
    def homogeneous_tuple(cls: Any, inner: cattrs.Converter) -> Any:
        kind = get_args(cls)[0]
        plain = inner.get_structure_hook(kind)

        def hook(value: object, _: Any) -> Any:
            if type(value) is not list:
                raise TypeError(f"must be a list, not {exact.kind(value)}")
            if kind is str and exact.are_strings(value):
                return tuple(value)
            return tuple(made for _, made in _each(cls, enumerate(value), plain, kind))

        return hook

    @converter.register_structure_hook_factory(_is_mapping)
    def mapping(cls: Any, inner: cattrs.Converter) -> Any:
        keys, kind = get_args(cls)
        plain_key, plain = inner.get_structure_hook(keys), inner.get_structure_hook(kind)

        def hook(value: object, _: Any) -> Any:
            if type(value) is not dict:
                raise TypeError(f"must be an object, not {exact.kind(value)}")
            if keys is kind is str and exact.are_strings(value, value.values()):
                return dict(value)
            sound = _each(cls, zip(value, value, strict=True), plain_key, keys)
            return {
                key: made
                for (_, key), (_, made) in zip(
                    sound, _each(cls, value.items(), plain, kind), strict=True
                )
            }

        return hook

    @converter.register_structure_hook_factory(attrs.has)
    def attrs_class(cls: type[T], inner: cattrs.Converter) -> Any:
        plain = cattrs.gen.make_dict_structure_fn(
            cls, inner, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True
        )

        def hook(value: object, cls: type[T]) -> T:
            if type(value) is not dict:
                raise TypeError(f"must be an object, not {exact.kind(value)}")
            if faults := _too_many(cls, value):
                raise cattrs.ClassValidationError("", faults, cls)
            try:
                return plain(value, cls)
            except cattrs.ClassValidationError as group:
                faults = [fault for fault in group.exceptions if _has_place(fault)]
                others = group.exceptions
            faults.extend(_out_of_bounds(inner, cls, value))
            raise cattrs.ClassValidationError("", faults or others, cls)

        return hook

    converter.register_unstructure_hook(
        datetime, lambda moment: moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
    )
    return converter


def _too_many(cls: Any, values: Mapping[str, object]) -> list[Exception]:
    """The faults of lists and objects with more entries than the validators of `cls` allow.

    The count comes first because it costs nothing: entries beyond a bound are never converted.
    """
    faults: list[Exception] = []
    for attribute in attrs.fields(cls):
        stated = getattr(attribute.validator, "schema", {})
        most = stated.get("maxItems", stated.get("maxProperties"))
        value = values.get(attribute.name)
        if most is not None and isinstance(value, list | dict) and len(value) > most:
            fault = ValueError(f"must have at most {most} entries, not {len(value)}")
            fault.add_note(AttributeValidationNote("", attribute.name, attribute.type))
            faults.append(fault)
    return faults


def _has_place(fault: Exception) -> bool:
    """Whether a fault carries the path of its value; one from a validator carries none."""
    notes = getattr(fault, "__notes__", ())
    return isinstance(fault, ForbiddenExtraKeysError | KeyError) or any(
        isinstance(note, AttributeValidationNote) for note in notes
    )


def _out_of_bounds(converter: cattrs.Converter, cls: Any, values: Any) -> list[Exception]:
    """Run the validators of all given fields; attrs itself would stop at the first fault.

    Values of a wrong type are skipped: the converter has already reported them.
    """
    faults: list[Exception] = []
    for attribute in attrs.fields(cls):
        if attribute.validator is None or attribute.name not in values:
            continue
        try:
            value = converter.structure(values[attribute.name], attribute.type)
        except (cattrs.BaseValidationError, TypeError, ValueError, KeyError):
            continue
        try:
            attribute.validator(None, attribute, value)
        except (ValueError, TypeError) as fault:
            fault.add_note(AttributeValidationNote("", attribute.name, attribute.type))
            faults.append(fault)
    return faults


def _describe(fault: BaseException, _: type | None) -> str:
    if isinstance(fault, KeyError):
        return "is missing"
    if isinstance(fault, ForbiddenExtraKeysError):
        return "unknown key " + ", ".join(
            repr(key) for key in sorted(fault.extra_fields)[:MAX_REPORTED_FAULTS]
        )
    return str(fault)


_converter = _make_converter()


def _made_or_faults(cls: type[T], value: object) -> tuple[T | None, list[tuple[str, str]]]:
    """The object, or None and at most `MAX_REPORTED_FAULTS` faults, each a path and a problem."""
    try:
        return _converter.structure(value, cls), []
    except (cattrs.BaseValidationError, TypeError, ValueError, KeyError) as error:
        faults = []
        for line in cattrs.transform_error(error, path="", format_exception=_describe):
            what, _, path = line.rpartition(" @ ")
            faults.append((shortened(path.lstrip(".")), shortened(what)))
        return None, faults[:MAX_REPORTED_FAULTS]


def _format_fault(path: str, what: str) -> str:
    return f"{path}: {what}" if path else what


def faults_of(cls: type[T], value: object) -> tuple[T | None, tuple[str, ...]]:
    """Make a `cls` from a plain `value`: the object and no faults, or None and the faults.

    There are at most `MAX_REPORTED_FAULTS` faults, each "path: problem". A path has dots and
    brackets, such as `limits.cpu_percent`.
    """
    made, faults = _made_or_faults(cls, value)
    return made, tuple(_format_fault(*fault) for fault in faults)


def structure(cls: type[T], value: object) -> T:
    """Make a `cls` from a plain `value`. Raises InvalidParams with the path of every fault.

    Its `data["faults"]` is a list of objects with `path` ("" for the whole value) and `problem`.
    """
    made, faults = _made_or_faults(cls, value)
    if faults or made is None:
        raise InvalidParams(
            "; ".join(_format_fault(*fault) for fault in faults),
            data={"faults": [{"path": path, "problem": what} for path, what in faults]},
        )
    return made


def unstructure(value: object) -> Any:
    """Convert attrs instances to dicts, lists, strings, numbers, bools and None."""
    return _converter.unstructure(value)


def as_plain(value: object) -> object:
    """Convert a Python value to the plain value that JSON would have; leave other values as is.

    Any iterable becomes a list, and a member of an enumeration becomes its value. Raises ValueError
    for a value nested deeper than `MAX_DEPTH` (also one that contains itself), and where the
    value's own code raises.
    """
    try:
        return _as_plain(value, MAX_DEPTH)
    except Exception as fault:
        raise ValueError(
            f"cannot be read: {shortened(str(fault) or type(fault).__name__)}"
        ) from fault


def _as_plain(value: object, depth: int) -> object:
    if depth < 0:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Enum):  # before str and int, which a member may be as well
        return _as_plain(value.value, depth - 1)
    if isinstance(value, str | bytes | bytearray | int | float | None):
        return value
    if isinstance(value, Mapping):
        return {name: _as_plain(content, depth - 1) for name, content in value.items()}
    if isinstance(value, Iterable):
        return [_as_plain(content, depth - 1) for content in value]
    simple = unstructure(value)
    return simple if simple is value else _as_plain(simple, depth - 1)


def faults_of_fields(cls: type[Any], values: Mapping[str, object]) -> tuple[str, ...]:
    """Return the faults of Python values that were passed to the constructor of an attrs class.

    The form is that of `faults_of`. Types are checked by the fields' annotations, and then bounds
    by their validators.
    """
    fields: dict[str, Any] = {each.name: each for each in attrs.fields(cls)}
    faults = [f"unknown name {shortened(name)!r}" for name in values if name not in fields]
    for name, attribute in fields.items():
        if name not in values:
            missing = attribute.default is attrs.NOTHING
            faults.extend([f"{name}: is missing"] * missing)
            continue
        try:
            plain = as_plain(values[name])
        except ValueError as fault:
            faults.append(f"{name}: {fault}")
            continue
        made, found = _made_or_faults(attribute.type, plain)
        faults.extend(_below(name, path, what) for path, what in found)
        if not found and attribute.validator is not None:
            try:
                attribute.validator(None, attribute, made)
            except (ValueError, TypeError) as fault:
                faults.append(f"{name}: {shortened(str(fault))}")
            else:
                faults.extend(_refused_as_it_is(attribute, values[name]))
    return tuple(faults[:MAX_REPORTED_FAULTS])


def _refused_as_it_is(attribute: Any, value: object) -> list[str]:
    """The faults of a value that is valid only as a plain value, such as a set instead of a list.

    If only parts of it are wrong, such as a Path in a list of strings, the faults name these parts.
    """
    try:
        attribute.validator(None, attribute, value)
    except Exception:  # noqa: BLE001 - a validator may fail in any way over a wrong type
        parts = _parts_of_another_kind(attribute.type, value) or {"": value}
        return [
            f"{attribute.name}{place}: cannot be made of a {type(part).__name__}"
            for place, part in parts.items()
        ]
    return []


def _parts_of_another_kind(cls: Any, value: object) -> dict[str, object]:
    """The entries of a list or mapping that have another type than `cls` states, by place."""
    if _is_tuple(cls) and isinstance(value, list | tuple):
        kind, items = get_args(cls)[0], list[tuple[object, object]](enumerate(value))
    elif _is_mapping(cls) and isinstance(value, Mapping):
        kind, items = get_args(cls)[1], list(value.items())
    else:
        return {}
    return {
        f"[{shortened(repr(place))}]": part for place, part in items if not isinstance(part, kind)
    }


def _below(name: str, path: str, what: str) -> str:
    """Format a fault at `path` inside the value `name`; a path begins with a bracket or a name."""
    return f"{name}{path if path.startswith('[') or not path else f'.{path}'}: {what}"
