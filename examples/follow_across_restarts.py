"""Follow a job's output, and go on where the last run of this program stopped.

    python examples/follow_across_restarts.py JOB FILE

JOB is the number of a job, FILE keeps how far this program has come. Stop the program at any time
and start it anew: it prints the rest. A restart of the service needs nothing: the client connects
again by itself, and the output goes on at the next byte.

The offset is saved after the bytes are printed. So a program that is killed in between prints the
last chunk twice, and never loses one.

The server and the client's three files come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH
and WORKER_CA_PATH.
"""

import os
import sys
from pathlib import Path

import trio

import jobworker


def saved_offset(file: Path) -> int:
    """How far an earlier run has come: bytes of both streams together."""
    return int(file.read_text()) if file.exists() else 0


def save_offset(file: Path, offset: int) -> None:
    """Replace the file as a whole: a program that is killed leaves the old one or the new one."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(str(offset))
    new.replace(file)


def tell_break(reason: jobworker.JobworkerError, offset: int) -> None:
    print(f"connection lost ({reason}); going on at byte {offset}", file=sys.stderr)


async def main(number: int, file: Path) -> None:
    async with jobworker.open_client(
        os.environ["WORKER_SERVER"],
        ca=os.environ["WORKER_CA_PATH"],
        certificate=os.environ["WORKER_CERT_PATH"],
        key=os.environ["WORKER_KEY_PATH"],
        patience_seconds=600,  # so long a service may be away
    ) as client:
        job = client.job(number)
        with job.output(offset=saved_offset(file), on_break=tell_break) as output:
            async for chunk in output:
                sys.stdout.buffer.write(chunk.data)
                sys.stdout.buffer.flush()
                save_offset(file, output.offset)
        assert output.record is not None  # the loop has come to the end of the output
        print(f"job {number}: {output.record.state.value}", file=sys.stderr)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), Path(sys.argv[2]))
