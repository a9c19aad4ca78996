"""Connecting: from an address and three files to a client whose connection is kept in a task."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from os import PathLike
from pathlib import Path

import trio

from jobworker.client.address import Address, parse_address
from jobworker.client.client import PATIENCE_SECONDS, Client
from jobworker.client.dial import serve_connection
from jobworker.errors import InvalidParams, JobworkerError
from jobworker.pki.tls import client_context


@asynccontextmanager
async def open_client(
    address: str | Address,
    *,
    ca: str | PathLike[str],
    certificate: str | PathLike[str],
    key: str | PathLike[str],
    patience_seconds: float = PATIENCE_SECONDS,
    on_lost: Callable[[JobworkerError], None] | None = None,
) -> AsyncIterator[Client]:
    """Connect to a server and be its client; the connection ends with the block, jobs go on.

    `address` is HOST, HOST:PORT or [IPv6]:PORT; the server's certificate must be from the CA in
    the PEM file `ca` and bear that host. `certificate` and `key` are the client's own PEM files.

    A connection that is lost is made anew when it is next needed: for `patience_seconds` (0 is
    never), after which ConnectionFailed is raised. `on_lost` hears of it.

    Raises InvalidParams for the address, CredentialsUnusable, HostUnknown, ConnectionFailed
    (after 10 s at the latest), ServerUntrusted, CertificateRefused and PermissionDenied.

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
    where = _parsed(address) if isinstance(address, str) else address
    tls = client_context(ca=Path(ca), certificate=Path(certificate), key=Path(key))
    client = Client(
        address=where,
        dial=partial(serve_connection, where, tls, own=Path(certificate)),
        patience_seconds=patience_seconds,
        on_lost=on_lost,
    )
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            # What ends the block is carried around the nursery, which would wrap it in a group.
            try:
                await nursery.start(client.serve)
                try:
                    yield client
                except Exception:
                    await client.aclose()
                    raise
                await client.aclose()
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
                raised = error
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup:
        if raised is None:
            raise
    if raised is not None:
        raise raised


def _parsed(address: str) -> Address:
    try:
        return parse_address(address)
    except ValueError as fault:
        raise InvalidParams(f"cannot connect: {fault}") from None
