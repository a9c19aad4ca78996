#!/usr/bin/env python3
"""Run a command as a job, print its output, stop it on Ctrl-C; with `websockets` and asyncio.

    pip install websockets && python run.py sh -c 'echo hello; sleep 60'

Server and certificates come from WORKER_SERVER, WORKER_CERT_PATH, WORKER_KEY_PATH and
WORKER_CA_PATH. Output comes as base64 in JSON. If the connection is lost, the service is restarted,
or this machine slept, it connects again and resumes the output where it stopped. In Python,
`jobworker.open_client` does all of this and more; this program shows how to do it without.
"""

import asyncio
import base64
import itertools
import json
import os
import signal
import ssl
import sys
from typing import Any, TextIO

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

WINDOW = 1 << 20
"""Credits: the server may send so many bytes in advance. Printed bytes are granted again."""
PATIENCE_SECONDS = 120
PING_SECONDS, SILENT_SECONDS = 15, 45
"""A service that stands still is given up after so long: docs/protocol.md, Silence."""
IN_VAIN = {1002, 1007, 1008, 1009, 1011}
"""Closing codes after which another connection would fail as well: docs/protocol.md, Closing."""


FILES = ("WORKER_CERT_PATH", "WORKER_KEY_PATH", "WORKER_CA_PATH")


def check_environment() -> None:
    """Exit with a message and code 78 if a variable or a file is missing."""
    if unset := [name for name in ("WORKER_SERVER", *FILES) if not os.environ.get(name)]:
        print(f"cannot connect: not set in the environment: {', '.join(unset)}", file=sys.stderr)
        sys.exit(78)
    try:
        for name in FILES:
            with open(os.environ[name], "rb"):  # the errors of ssl do not name the file
                pass
        tls()
    except OSError as error:
        print(f"cannot use the files of {', '.join(FILES)}: {error}", file=sys.stderr)
        sys.exit(72)


def tls() -> ssl.SSLContext:
    """A context for mutual TLS that trusts only the service's CA."""
    context = ssl.create_default_context(cafile=os.environ["WORKER_CA_PATH"])
    context.load_cert_chain(os.environ["WORKER_CERT_PATH"], os.environ["WORKER_KEY_PATH"])
    return context


class Refused(Exception):
    """The server answered a call with an error."""


class Unprintable(Exception):
    """A standard stream refused the job's bytes: its reader left, or the disk is full."""


def write(stream: TextIO, data: bytes) -> None:
    """Print bytes as they are. Raises Unprintable, which is no fault of the connection."""
    try:
        stream.buffer.write(data)
        stream.buffer.flush()
    except OSError as error:
        # Otherwise Python tries to flush the stream again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise Unprintable from error


class Run:
    """One job, over as many connections as it takes."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.ids = itertools.count(1)
        self.job: int | None = None
        self.offset = 0  # the end of the printed output, counted in both streams together
        self.asked = False  # whether the server may have got the request to start the job
        self.stopping = False
        self.socket: ClientConnection | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def call(self, method: str, params: Any) -> None:
        """Send a request. The reply arrives among the other messages."""
        request = {"jsonrpc": "2.0", "id": next(self.ids), "method": method, "params": params}
        assert self.socket is not None
        await self.socket.send(json.dumps(request))

    async def notify(self, method: str, params: Any) -> None:
        """Send a notification, which has no reply."""
        assert self.socket is not None
        await self.socket.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}))

    def stop(self) -> None:
        """Ask for the job's end; again after a reconnection."""
        self.stopping = True
        if self.job is not None and self.socket is not None:
            task = asyncio.get_running_loop().create_task(self.call("job.stop", {"id": self.job}))
            self.tasks.add(task)
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def begin(self) -> None:
        """Run the command, or resume the output of the job that runs already."""
        delivery = {"encoding": "base64", "credit_bytes": WINDOW}
        if self.job is None:
            self.asked = True
            await self.call("job.run", {"job": {"command": self.command}, "follow": delivery})
            return
        follow = {"id": self.job, "offset": self.offset, "delivery": delivery}
        await self.call("job.log", follow)
        if self.stopping:
            self.stop()

    async def serve(self) -> dict[str, Any]:
        """Print output until the job's end; its final record. Raises ConnectionClosed, Refused."""
        await self.begin()
        assert self.socket is not None
        while True:
            message = json.loads(await self.socket.recv())
            params = message.get("params", {})
            if "error" in message:
                raise Refused(message["error"]["message"])
            if "result" in message and "job" in message["result"]:
                self.job = message["result"]["job"]["id"]
                print(f"job {self.job}", file=sys.stderr, flush=True)
            elif message.get("method") == "job.output":
                data = base64.b64decode(params["data"])
                write(sys.stderr if params["stream"] == "stderr" else sys.stdout, data)
                self.offset = params["offset"] + len(data)
                credit = {"subscription": params["subscription"], "bytes": len(data)}
                await self.notify("job.credit", credit)
            elif message.get("method") == "job.output_end":
                if (params.get("error") or {}).get("name") == "shutting_down":
                    await self.socket.wait_closed()  # the next service has the rest
                elif params.get("error"):
                    raise Refused(params["error"]["message"])
                else:
                    return dict(params["job"])


async def main(command: list[str]) -> int:
    """Run the command, and return its exit code."""
    run, loop = Run(command), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, run.stop)
    lost_at = None
    while True:
        try:
            async with connect(
                f"wss://{os.environ['WORKER_SERVER']}/",
                ssl=tls(),
                subprotocols=["jobworker.v1"],  # type: ignore[list-item]
                compression=None,
                open_timeout=10,
                ping_interval=PING_SECONDS,
                ping_timeout=SILENT_SECONDS - PING_SECONDS,
            ) as run.socket:
                lost_at = None
                last = await run.serve()
                break
        except Refused as refused:
            print(refused, file=sys.stderr)
            return 70
        except Unprintable as failed:
            if isinstance(failed.__cause__, BrokenPipeError):
                return 141  # 128 + SIGPIPE, as shells have it; the job goes on
            print(f"cannot print: {failed.__cause__}", file=sys.stderr)
            return 83
        except ConnectionClosed as closed:
            why, again = str(closed), closed.rcvd is None or closed.rcvd.code not in IN_VAIN
        except OSError as error:
            why, again = str(error), not isinstance(error, ssl.SSLCertVerificationError)
        lost_at = loop.time() if lost_at is None else lost_at
        if run.job is None or not again or loop.time() - lost_at > PATIENCE_SECONDS:
            maybe = "; the job may have been started" if run.asked and run.job is None else ""
            print(f"cannot go on: {why}{maybe}", file=sys.stderr)
            return 69
        await asyncio.sleep(0.5)
    print(f"job {last['id']}: {last['state']}", file=sys.stderr)
    if last["exit_code"] is not None:
        return int(last["exit_code"])
    return 128 + last["signal"] if last["signal"] else 125


if __name__ == "__main__":
    check_environment()
    sys.exit(asyncio.run(main(sys.argv[1:])))
