"""Stop jobs, limit their time, and tell how each has ended.

    python examples/stop_and_timeout.py

Six jobs show the six ends that a program has to tell apart: success, an exit code, a signal, the
job's own time limit, a stop, and a program that does not exist. The last part stops a job whose
wait was cancelled: cancelling a call never stops a job.

The server and the client's three files come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH
and WORKER_CA_PATH.
"""

import os

import trio

import jobworker

CLEAN_UP_SECONDS = 10


def told(record: jobworker.JobRecord) -> str:
    """How a job ended: its state, and what stands behind it."""
    if record.exit_code is not None:
        ending = f"exit code {record.exit_code}"
    elif record.signal is not None:
        ending = f"signal {record.signal}"
    else:
        ending = record.detail
    reason = "" if record.reason is None else f", reason {record.reason.value}"
    return f"{record.state.value}{reason}, {ending}"


async def show_ends(client: jobworker.Client) -> None:
    for title, script in (("success", "true"), ("exit code", "exit 3")):
        job = await client.run(["sh", "-c", script])
        print(f"{title}: {told(await job.wait())}")

    # PID 1 of a job has no default actions of signals; with `init` the program is not PID 1.
    job = await client.run(jobworker.JobSpec(command=("sh", "-c", "kill -9 $$"), init=True))
    print(f"signal: {told(await job.wait())}")

    job = await client.run(jobworker.JobSpec(command=("sleep", "600"), timeout_seconds=0.5))
    print(f"time limit: {told(await job.wait())}")

    # SIGTERM, then SIGKILL for what is left after the grace period. PID 1 of a job gets no signal
    # that it does not handle, and `sleep` handles none: the launcher sees that and kills at once.
    job = await client.run(["sleep", "600"])
    print(f"stop: {told(await job.stop(grace_seconds=2))}")

    try:
        await client.run(["no-such-program"])
    except jobworker.JobworkerError as error:
        print(f"no program: {error.name}, exit code {error.exit_code} as of a shell")


async def stop_what_was_cancelled(client: jobworker.Client) -> None:
    job = await client.run(["sleep", "600"])
    try:
        with trio.move_on_after(0.5):
            await job.wait()
    finally:
        # Shielded, so that it also runs where the whole program is cancelled; and bounded.
        with trio.move_on_after(CLEAN_UP_SECONDS, shield=True):
            record = await job.stop(grace_seconds=1)
    print(f"cancelled wait, then stop: {record.state.value}")


async def main() -> None:
    async with jobworker.open_client(
        os.environ["WORKER_SERVER"],
        ca=os.environ["WORKER_CA_PATH"],
        certificate=os.environ["WORKER_CERT_PATH"],
        key=os.environ["WORKER_KEY_PATH"],
    ) as client:
        await show_ends(client)
        await stop_what_was_cancelled(client)


if __name__ == "__main__":
    trio.run(main)
