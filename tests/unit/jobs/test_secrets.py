"""Secret variables between admission and start: bounded, shared fairly, and then forgotten."""

import pytest
import trio
import trio.testing

from jobworker.errors import Busy
from jobworker.jobs import secrets
from jobworker.jobs.secrets import SMALL_BYTES, Secrets, check_room
from jobworker.model.units import format_size


def of_size(size: int) -> Secrets:
    return Secrets(["x" * size])


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "MAX_OWNER_BYTES", 20_000)
    monkeypatch.setattr(secrets, "MAX_BYTES", 50_000)


async def test_values_come_back_as_they_were_given_until_the_job_has_started() -> None:
    given = {f"S{number}": f"é{number}\n" * 200 for number in range(500)}
    mine = await Secrets.of(given)
    assert len(mine._pieces) > 1, "a long request is taken in pieces"
    assert await mine.values() == given
    assert "é" not in repr(mine)
    mine.drop()
    assert (await mine.values(), mine.size) == ({}, 0)


async def test_other_tasks_have_their_turns_between_the_pieces() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await trio.lowlevel.checkpoint()
        mine = await Secrets.of({f"S{number}": "x" * 2000 for number in range(500)})
        pieces = len(mine._pieces)
        assert turns >= pieces - 1 > 1
        turns = 0
        await mine.values()
        assert turns >= pieces - 1
        nursery.cancel_scope.cancel()


def test_small_secrets_take_nothing_of_the_bounds() -> None:
    assert of_size(SMALL_BYTES).size == 0
    assert of_size(SMALL_BYTES + 1).size == SMALL_BYTES + 1
    assert Secrets(["x" * SMALL_BYTES, "x"]).size == SMALL_BYTES + 1
    full = [(True, of_size(20_001)), (False, of_size(30_001))]
    check_room(of_size(SMALL_BYTES), full)
    check_room(of_size(10_000), [(True, of_size(SMALL_BYTES))] * 100)


@pytest.mark.parametrize(
    ("own", "others", "whose"),
    [
        (10_000, 30_000, ""),
        (10_001, 0, "your"),
        (10_000, 30_001, "all"),
        (10_001, 30_001, "your"),
    ],
)
def test_bounds_are_on_each_owner_and_on_all(own: int, others: int, whose: str) -> None:
    waiting = [(True, of_size(own)), (False, of_size(others))]
    if not whose:
        check_room(of_size(10_000), waiting)
        return
    with pytest.raises(Busy, match=f"secret variables of {whose} waiting jobs") as refused:
        check_room(of_size(10_000), waiting)
    assert format_size(20_000 if whose == "your" else 50_000) in refused.value.message
