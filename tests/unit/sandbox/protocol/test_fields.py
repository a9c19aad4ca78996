"""How values of a message are checked, and where a member may be absent or null."""

from typing import NamedTuple

import pytest

from jobworker.sandbox.protocol import fields as f


class Pair(NamedTuple):
    """A record of two values."""

    one: object
    two: object


def read(field: f.Field, **message: object) -> object:
    return field.read(message)


@pytest.mark.parametrize(
    ("field", "taken", "refused"),
    [
        (f.integer("x", 1, 3), [1, 3], [0, 4, True, 1.0, "1", None, [1]]),
        (f.count("x"), [0, -1, 1 << 200], [True, 1.0, "1", None]),
        (f.seconds("x"), [0, -1.5, 7], [True, "1", None, float("nan"), float("inf")]),
        (f.text("x"), ["", "\0", "\ud800"], [None, 1, b"", ["x"]]),
        (f.flag("x"), [True, False], [0, 1, None, "true"]),
        (f.count_or_null("x"), [7, None], [True, "7", 7.0]),
    ],
)
def test_value_is_taken_exactly_as_it_is_or_refused_by_name(
    field: f.Field, taken: list[object], refused: list[object]
) -> None:
    for value in taken:
        assert read(field, x=value) is value
        assert field.write(value) == {"x": value}  # type: ignore[arg-type]
    for value in refused:
        with pytest.raises(f.Malformed, match=r"^x is n"):
            read(field, x=value)
    with pytest.raises(f.Malformed, match=r"^x is n"):
        read(field)


def test_whole_number_beyond_every_float_is_no_time() -> None:
    with pytest.raises(f.Malformed, match="no finite number"):
        read(f.seconds("x"), x=10**400)


def test_optional_member_may_be_absent_and_not_wrong() -> None:
    field = f.optional(f.count("x"), 7)
    assert read(field) == 7
    assert read(field, x=9) == 9
    with pytest.raises(f.Malformed):
        read(field, x=None)


def test_list_is_a_tuple_of_values_that_pass() -> None:
    field = f.many("x", f.as_text)
    assert read(field, x=["a", "b"]) == ("a", "b")
    assert field.write(("a", "b")) == {"x": ["a", "b"]}  # type: ignore[arg-type]
    for value in (None, "ab", {"a": 1}, ["a", 1]):
        with pytest.raises(f.Malformed, match=r"^x is no"):
            read(field, x=value)


INNER: f.Fields = (f.count("one"), f.text("two"))


def test_record_stands_in_the_message_or_in_a_member_of_it() -> None:
    record = Pair(1, "b")
    flat, nested = f.flat(Pair, INNER), f.nested("x", Pair, INNER)
    assert flat.names == ("one", "two")
    assert read(flat, one=1, two="b") == read(nested, x={"one": 1, "two": "b"}) == record
    assert f.encode((nested,), (record,)) == {"x": {"one": 1, "two": "b"}}
    assert f.encode((flat,), (record,)) == {"one": 1, "two": "b"}
    with pytest.raises(f.Malformed, match=r"^two is no text"):
        read(nested, x={"one": 1})


def test_record_may_be_null_and_not_absent() -> None:
    field = f.nested_or_null("x", Pair, INNER)
    assert read(field, x=None) is None
    assert f.encode((field,), (None,)) == {"x": None}
    assert f.encode((field,), (Pair(1, "b"),)) == {"x": {"one": 1, "two": "b"}}
    wrong: tuple[f.Object, ...] = ({}, {"x": []}, {"x": False})
    for message in wrong:
        with pytest.raises(f.Malformed, match=r"^x is no object"):
            field.read(message)


def test_records_come_as_a_list_of_objects() -> None:
    field = f.several("x", Pair, INNER)
    records = (Pair(1, "b"), Pair(2, "c"))
    message = f.encode((field,), (records,))
    assert field.read(message) == records
    wrong: tuple[object, ...] = ({}, [[]], [None], [{"one": 1}])
    for value in wrong:
        with pytest.raises(f.Malformed):
            read(field, x=value)
