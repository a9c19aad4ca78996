"""Open a client: from an address and three files to a client with a task for its connection."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from os import PathLike
from pathlib import Path

import trio
from attrs import define

from jobworker.client.address import Address, parse_address
from jobworker.client.calls import PATIENCE_SECONDS, Calls
from jobworker.client.checked import check_callback
from jobworker.client.client import Client
from jobworker.client.credentials import Credentials
from jobworker.client.dial import Connection, serve_connection
from jobworker.errors import InvalidParams, JobworkerError, LoopMissing
from jobworker.serialization.exact import kind

LONGEST_PATH = 4096
"""Characters: PATH_MAX of Linux, limits.h(0p)."""


@asynccontextmanager
async def open_client(
    address: str | Address,
    *,
    ca: str | PathLike[str],
    certificate: str | PathLike[str],
    key: str | PathLike[str],
    patience_seconds: float = PATIENCE_SECONDS,
    start_patience_seconds: float = 0,
    on_lost: Callable[[JobworkerError], None] | None = None,
    on_refused: Callable[[JobworkerError], None] | None = None,
) -> AsyncIterator[Client]:
    """Connect to a server for the block; at its end, the connection is closed and jobs go on.

    `address` is HOST, HOST:PORT or [IPv6]:PORT; the server's certificate must be from the CA in
    the PEM file `ca` and for that host. `certificate` and `key` are the client's own PEM files. All
    three are read again for each connection, so they may be replaced meanwhile.

    If the connection is lost, the client reconnects when a call needs it. It tries for
    `patience_seconds` (0 is never), and then the waiting calls raise ConnectionFailed. `on_lost` is
    called with the reason before it reconnects.

    A connection counts as lost, too, if nothing arrives for 45 s while something waits, not even
    the answer to a ping: the service stands still, or the network drops everything.

    The client tries to make the first connection once. With `start_patience_seconds`, it retries
    for so long if nothing listens or the connection breaks, as during a restart of the service.
    `on_refused` is called with the first failure.

    If the block is cancelled, its `finally` clauses may still make calls, in a shielded scope with
    a time-out of their own.

    Raises LoopMissing outside of Trio, InvalidParams for the arguments, CredentialsUnusable,
    HostUnknown, ConnectionFailed (after 10 s at the latest), ServerUntrusted, CertificateRefused
    and PermissionDenied.

    >>> async with open_client(server, ca=ca, certificate=certificate, key=key) as mine:
    ...     job = await mine.run(["echo", "hello"])
    ...     record = await job.wait()
    >>> record.exit_code
    0

    >>> async with open_client("localhost:1", ca=ca, certificate=certificate, key=key) as mine:
    ...     pass
    Traceback (most recent call last):
    jobworker.errors.ConnectionFailed: cannot connect to localhost:1: Connection refused; ...
    """
    _check_loop()
    where = address if isinstance(address, Address) else _parsed(address)
    credentials = Credentials(_file("ca", ca), _file("certificate", certificate), _file("key", key))
    _check_seconds("patience_seconds", patience_seconds)
    _check_seconds("start_patience_seconds", start_patience_seconds)
    check_callback("connect", "on_lost", on_lost)
    check_callback("connect", "on_refused", on_refused)
    await credentials.renewed()
    calls = Calls(
        address=where,
        dial=partial(_dial, where, credentials),
        patience_seconds=patience_seconds,
        start_patience_seconds=start_patience_seconds,
        on_lost=on_lost,
        on_refused=on_refused,
    )
    service, raised = trio.CancelScope(), None
    faults: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        # The block's exception is raised after the nursery, which would wrap it in a group.
        try:
            await nursery.start(_serve, calls, service, nursery.cancel_scope, faults)
            try:
                yield Client(calls=calls)
            except Exception:
                await calls.aclose()
                raise
            await calls.aclose()
        except (trio.Cancelled, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001
            raised = error
        finally:
            await calls.aclose(goodbye=False)
            service.cancel()
    for fault in faults:  # the cause of `raised`
        raise fault
    if raised is not None:
        raise raised


@define
class _Shielding(trio.TaskStatus[None]):
    """Shields a scope when its task has started."""

    _scope: trio.CancelScope
    _inner: trio.TaskStatus[None]

    def started(self, value: None = None) -> None:
        """See trio.TaskStatus."""
        self._scope.shield = True
        self._inner.started(value)


async def _serve(
    calls: Calls,
    service: trio.CancelScope,
    block: trio.CancelScope,
    faults: list[BaseException],
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Serve the connection until `service` is cancelled.

    Once there is a connection, `service` is shielded from other cancellations. So a cancelled block
    may still make calls while it ends, for example to stop a job. An exception of a callback is
    added to `faults` and cancels the block.
    """
    with service:
        try:
            await calls.serve(task_status=_Shielding(service, task_status))
        except BaseException as fault:
            if _is_cancellation(fault) or not service.shield:  # before `started`, `start` raises it
                raise
            faults.append(fault)
            block.cancel()
            await calls.aclose(goodbye=False)


def _is_cancellation(raised: BaseException) -> bool:
    if isinstance(raised, BaseExceptionGroup):
        return raised.subgroup(trio.Cancelled) is not None
    return isinstance(raised, trio.Cancelled)


def _check_loop() -> None:
    if not trio.lowlevel.in_trio_run():
        raise LoopMissing(
            "cannot open a client: no Trio event loop runs here",
            remedy="call it below trio.run(); in an asyncio program, speak the protocol as "
            "contrib/clients/python does, or run Trio in a thread of its own",
        )


async def _dial(
    where: Address,
    credentials: Credentials,
    *,
    task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED,
) -> None:
    tls = await credentials.renewed()
    await serve_connection(where, tls, own=credentials.certificate, task_status=task_status)


def _file(name: str, path: object) -> Path:
    text = os.fspath(path) if isinstance(path, str | PathLike) else None
    if not isinstance(text, str):
        raise InvalidParams(f"cannot connect: {name}: must be the path of a file, not {kind(path)}")
    if len(text) > LONGEST_PATH:
        raise InvalidParams(
            f"cannot connect: {name}: must be the path of a file, not {len(text)} characters"
        )
    return Path(text)


def _check_seconds(name: str, seconds: object) -> None:
    """Raise InvalidParams for a value that is not a number of at least 0; infinity is allowed."""
    wrong: object = kind(seconds)
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        try:
            wrong = float(seconds)
        except OverflowError:
            wrong = "one of hundreds of digits"
        else:
            if wrong >= 0:
                return
    raise InvalidParams(f"cannot connect: {name}: must be 0 or more seconds, not {wrong}")


def _parsed(address: str) -> Address:
    if not isinstance(address, str):
        raise InvalidParams(f"cannot connect: address: must be a string, not {kind(address)}")
    try:
        return parse_address(address)
    except ValueError as fault:
        raise InvalidParams(f"cannot connect: {fault}") from None
