#!/usr/bin/env python3
"""Run a command as a job, print its output, stop it on Ctrl-C; with `websockets` and asyncio.

    pip install websockets && python run.py sh -c 'echo hello; sleep 60'

Server and certificates come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH and
WORKER_CA_PATH. Output travels as base64 in JSON. From Python, `jobworker.open_client` does all of
this and more; here is what it takes without it.
"""

import asyncio
import base64
import itertools
import json
import os
import signal
import ssl
import sys
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

WINDOW = 1 << 20
"""Credits: the server may be so many bytes ahead, and what was written is granted anew."""


def tls() -> ssl.SSLContext:
    """Mutual TLS, with our CA and nobody else's."""
    context = ssl.create_default_context(cafile=os.environ["WORKER_CA_PATH"])
    context.load_cert_chain(os.environ["WORKER_CERT_PATH"], os.environ["WORKER_KEY_PATH"])
    return context


async def send(socket: ClientConnection, method: str, params: Any, id_: int | None = None) -> None:
    """Send a request, or a notification where there is no id."""
    request = {"jsonrpc": "2.0", "method": method, "params": params}
    await socket.send(json.dumps(request if id_ is None else {**request, "id": id_}))


async def main(command: list[str]) -> int:
    """Run the command: the exit code."""
    ids, job = itertools.count(1), None
    async with connect(
        f"wss://{os.environ['WORKER_SERVER']}/",
        ssl=tls(),
        subprotocols=["jobworker.v1"],  # type: ignore[list-item]
        compression=None,
    ) as socket:
        follow = {"encoding": "base64", "credit_bytes": WINDOW}
        await send(socket, "job.run", {"job": {"command": command}, "follow": follow}, next(ids))

        def stop() -> None:
            if job is not None:
                stopping.add(loop.create_task(send(socket, "job.stop", {"id": job}, next(ids))))

        stopping: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stop)
        async for text in socket:
            message = json.loads(text)
            if "error" in message:
                print(message["error"]["message"], file=sys.stderr)
                return 70
            if message.get("id") == 1:
                job = message["result"]["job"]["id"]
                print(f"job {job}", file=sys.stderr)
            elif message.get("method") == "job.output":
                params = message["params"]
                data = base64.b64decode(params["data"])
                stream = sys.stderr if params["stream"] == "stderr" else sys.stdout
                stream.buffer.write(data)
                stream.buffer.flush()
                credit = {"subscription": params["subscription"], "bytes": len(data)}
                await send(socket, "job.credit", credit)
            elif message.get("method") == "job.output_end":
                last = message["params"]["job"]
                print(f"job {last['id']}: {last['state']}", file=sys.stderr)
                if last["exit_code"] is not None:
                    return int(last["exit_code"])
                return 128 + last["signal"] if last["signal"] else 125
    print("cannot go on: the server closed the connection", file=sys.stderr)
    return 69


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
