"""Which connection may begin another call, by what the calls of its name and of all names cost."""

import trio
from trio.testing import wait_all_tasks_blocked

from jobworker.server.fairness.call_budget import CALL_BYTES, CallBudget, CallCost, ConnectionCalls


async def begin(connection: ConnectionCalls, begun: list[CallCost]) -> None:
    await connection.wait_for_room()
    begun.append(connection.begin())


def end(call: CallCost) -> None:
    with call:
        pass


async def test_connection_with_a_call_waits_while_its_name_has_used_up_its_part() -> None:
    budget = CallBudget(in_all=100 * CALL_BYTES, for_each=3 * CALL_BYTES)
    one, other = budget.connection("ann"), budget.connection("ann")
    begun = list[CallCost]()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            await begin(one, begun)
        await begin(other, begun)  # it has none yet, and may always have one
        nursery.start_soon(begin, one, begun)
        nursery.start_soon(begin, other, begun)
        await wait_all_tasks_blocked()
        assert len(begun) == 4
        await begin(budget.connection("bob"), [])
        end(begun[0])
        await wait_all_tasks_blocked()
        assert len(begun) == 4, "three are as many as before"
        end(begun[1])
        await wait_all_tasks_blocked()
        assert len(begun) == 5, "one goes on for each that ends"
        end(begun[2])
        await wait_all_tasks_blocked()
        assert len(begun) == 6
    for call in begun[3:]:
        end(call)
    assert budget.taken_bytes == CALL_BYTES, "that of bob"


async def test_connection_goes_on_when_its_last_call_has_ended_whatever_others_do() -> None:
    budget = CallBudget(in_all=100 * CALL_BYTES, for_each=2 * CALL_BYTES)
    flooding, reading = budget.connection("ann"), budget.connection("ann")
    floods, begun = list[CallCost](), list[CallCost]()
    for _ in range(2):
        await begin(flooding, floods)
    floods[0].add(10 * CALL_BYTES)  # the reply, which nobody takes
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(begin, reading, begun)
            await wait_all_tasks_blocked()
            assert len(begun) == max(1, number)
            if number:
                end(begun[number - 1])
                await wait_all_tasks_blocked()
                assert len(begun) == number + 1
        nursery.cancel_scope.cancel()


async def test_equal_part_of_the_whole_is_there_for_each_name() -> None:
    budget = CallBudget(in_all=9 * CALL_BYTES, for_each=6 * CALL_BYTES)
    for name in ("ann", "bob"):
        connection = budget.connection(name)
        for _ in range(5):
            connection.begin()
    assert not budget.has_room("ann")
    quiet, begun = budget.connection("quiet"), list[CallCost]()
    for number in range(4):
        assert budget.has_room("quiet") == (number < 3), "nine of three names"
        if number < 3:
            await begin(quiet, begun)


async def test_names_go_on_by_turns() -> None:
    budget = CallBudget(in_all=4 * CALL_BYTES, for_each=4 * CALL_BYTES)
    full = budget.connection("full")
    calls = [full.begin() for _ in range(4)]
    went_on = list[str]()

    async def wait(name: str, connection: ConnectionCalls) -> None:
        await connection.wait_for_room()
        went_on.append(name)

    async with trio.open_nursery() as nursery:
        for name in ("ann", "bob"):
            held = budget.connection(name)
            held.begin().add(3 * CALL_BYTES)
            for _ in range(2):
                connection = budget.connection(name)
                connection.begin()
                nursery.start_soon(wait, name, connection)
                await wait_all_tasks_blocked()
        assert not went_on
        budget.for_each = budget.in_all = 100 * CALL_BYTES
        for call in calls:
            end(call)
            await wait_all_tasks_blocked()
    assert went_on == ["ann", "bob", "ann", "bob"]


async def test_cancelled_wait_leaves_nothing_behind() -> None:
    budget = CallBudget(in_all=2 * CALL_BYTES, for_each=CALL_BYTES)
    connection = budget.connection("ann")
    call = connection.begin()
    with trio.move_on_after(0):
        await connection.wait_for_room()
    assert not budget._waiting
    end(call)
    assert not budget.taken_bytes
    assert not budget._taken


async def test_call_costs_nothing_while_it_waits_for_a_job() -> None:
    budget = CallBudget(in_all=2 * CALL_BYTES, for_each=CALL_BYTES)
    connection = budget.connection("ann")
    call = connection.begin()
    with call:
        with call.waiting():
            assert not budget.taken_bytes
            await connection.wait_for_room()
        assert budget.taken_bytes == CALL_BYTES
        call.add(100)
        assert budget.taken_bytes == CALL_BYTES + 100
    assert not budget.taken_bytes
