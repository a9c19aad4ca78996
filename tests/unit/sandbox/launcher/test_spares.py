"""Which spare a start gets, and when another one is to be made."""

from jobworker.sandbox.launcher.spares import Spares

from .conftest import new_child


def test_start_gets_the_spare_with_its_host_name_and_else_the_oldest() -> None:
    spares = Spares(3)
    oldest, named, newest = (new_child(number) for number in range(3))
    for child in (oldest, named, newest):
        spares.add(child)
    named.host_name = "job-7"
    assert spares.take("job-7") is named
    assert spares.take("job-8") is oldest
    assert spares.take("job-7") is newest
    assert spares.take("job-7") is None


def test_one_spare_is_made_at_a_time_until_there_are_enough() -> None:
    spares = Spares(2)
    for number in range(2):
        child = new_child(number)
        assert spares.needs_another
        spares.begin(child)
        assert spares.are_left
        assert child not in spares, "it does not wait yet"
        assert not spares.needs_another
        assert spares.end_making(child)
        spares.add(child)
        assert child in spares
    assert not spares.needs_another


def test_spare_that_a_start_takes_while_it_is_made_is_none_any_more() -> None:
    spares, child = Spares(1), new_child(0)
    assert spares.take_unmade() is None
    spares.begin(child)
    assert spares.take_unmade() is child
    assert not spares.end_making(child)
    assert not spares.are_left


def test_spare_that_is_discarded_is_taken_by_no_start() -> None:
    spares, child = Spares(1), new_child(0)
    spares.add(child)
    spares.discard(new_child(1))
    assert child in spares
    spares.discard(child)
    assert spares.take("") is None
    assert spares.needs_another
