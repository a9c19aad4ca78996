"""Run one command as a job, print its output as it comes, and exit with the job's code.

    python examples/run_one.py sh -c 'echo hello; exit 3'

The server and the client's three files come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH
and WORKER_CA_PATH, as for `worker-cli`. The program exits with 1 where the job has no exit code of
its own: a signal ended it, say.
"""

import os
import sys

import trio

import jobworker


async def main(command: list[str]) -> int:
    async with jobworker.open_client(
        os.environ["WORKER_SERVER"],
        ca=os.environ["WORKER_CA_PATH"],
        certificate=os.environ["WORKER_CERT_PATH"],
        key=os.environ["WORKER_KEY_PATH"],
    ) as client:
        # With `follow` the first output comes without another question to the server.
        job = await client.run(command, follow=True)
        with job.output() as output:
            async for chunk in output:
                own = sys.stdout if chunk.stream is jobworker.Stream.STDOUT else sys.stderr
                own.buffer.write(chunk.data)
                own.buffer.flush()
        record = await job.wait()
    return 1 if record.exit_code is None else record.exit_code


if __name__ == "__main__":
    try:
        sys.exit(trio.run(main, sys.argv[1:]))
    except jobworker.JobworkerError as error:  # it says what failed, why, and what to do
        print(f"run_one: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
