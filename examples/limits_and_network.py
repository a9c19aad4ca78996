"""Run a job with limits, variables, a secret variable and a network of its own.

    python examples/limits_and_network.py

The server and the client's three files come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH
and WORKER_CA_PATH. The server needs slirp4netns: without it a job with `network="private"` is
refused.
"""

import os

import trio

import jobworker

SPEC = jobworker.JobSpec(
    command=(
        "sh",
        "-c",
        'echo "$GREETING, a token of ${#TOKEN} characters"; '
        "echo interfaces: $(tail -n +3 /proc/net/dev | cut -d: -f1)",
    ),
    environment={"GREETING": "hello"},
    # The job alone gets the value: no record, log or disk has it.
    secret_environment={"TOKEN": "correct horse"},
    limits=jobworker.Limits(
        cpu_percent=50,  # of one core
        memory_bytes=64 << 20,  # swap included; a job that goes over ends with reason `oom`
        processes=32,
        disk_bytes=64 << 20,  # all that the job writes to its root
    ),
    network="private",  # outbound connections alone, none of them to the server's host
    timeout_seconds=60,
)


async def main() -> None:
    async with jobworker.open_client(
        os.environ["WORKER_SERVER"],
        ca=os.environ["WORKER_CA_PATH"],
        certificate=os.environ["WORKER_CERT_PATH"],
        key=os.environ["WORKER_KEY_PATH"],
    ) as client:
        job = await client.run(SPEC)
        async for chunk in job.output():
            print(chunk.data.decode(errors="replace"), end="")
        record = await job.wait()
        print(f"state: {record.state.value}")
        # `status` answers the whole record; `run`, `wait` and `list` answer summaries.
        told = await job.status()
        print(f"variables: {dict(told.spec.environment)}")
        print(f"secret variables: {dict(told.spec.secret_environment)}")


if __name__ == "__main__":
    trio.run(main)
