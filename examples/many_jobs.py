"""Run many jobs, a few at a time, and print their results in order.

    python examples/many_jobs.py

A nursery runs one task for each job; a capacity limiter lets four of them have a job at a time.
One client serves all tasks: their calls share its connection. Where a task raises, the nursery
cancels the others; cancelling a call stops no job, so a program that wants its jobs stopped does
that itself (see stop_and_timeout.py).

The server and the client's three files come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH
and WORKER_CA_PATH.
"""

import os

import trio

import jobworker

AT_A_TIME = 4
NUMBERS = range(1, 13)


async def square(
    client: jobworker.Client, number: int, limiter: trio.CapacityLimiter, results: dict[int, int]
) -> None:
    """Have a job compute the square of a number, once there is a place for it."""
    async with limiter:
        job = await client.run(["sh", "-c", "echo $(($1 * $1))", "sh", str(number)], follow=True)
        data = b"".join([chunk.data async for chunk in job.output()])
        record = await job.wait()
    if record.state is not jobworker.State.COMPLETED:
        raise RuntimeError(f"job {job.id} is {record.state.value}: {record.detail}")
    results[number] = int(data)


async def main() -> None:
    results: dict[int, int] = {}
    limiter = trio.CapacityLimiter(AT_A_TIME)
    async with (
        jobworker.open_client(
            os.environ["WORKER_SERVER"],
            ca=os.environ["WORKER_CA_PATH"],
            certificate=os.environ["WORKER_CERT_PATH"],
            key=os.environ["WORKER_KEY_PATH"],
        ) as client,
        trio.open_nursery() as nursery,
    ):
        for number in NUMBERS:
            nursery.start_soon(square, client, number, limiter, results)
    for number in NUMBERS:
        print(f"{number} * {number} = {results[number]}")


if __name__ == "__main__":
    trio.run(main)
