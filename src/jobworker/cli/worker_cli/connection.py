"""Opens the connection to the server that a command's options name."""

import sys
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from jobworker.cli.worker_cli.connection_options import Invocation
from jobworker.cli.worker_cli.console import LossReporter

if TYPE_CHECKING:
    from jobworker.client.client import Client


def open_connection(
    invocation: Invocation,
    *,
    patient: bool = True,
    quiet: bool = False,
    losses: LossReporter | None = None,
) -> "AbstractAsyncContextManager[Client]":
    """Connect to the server that options, environment or configuration file name.

    If the server does not answer, for example during a restart, the client tries again: for
    WORKER_PATIENCE at the first connection, for its own `PATIENCE_SECONDS` at later ones. With
    `patient=False` it does not. `quiet` prints no line about a lost connection. A line about the
    first connection goes to a terminal only, because its failure is printed in any case. `losses`
    is the reporter that a printer of output also uses.
    """
    from jobworker.client.calls import PATIENCE_SECONDS
    from jobworker.client.opening import open_client

    target = invocation.target()
    report_lost = (losses or LossReporter()).report_reconnect
    return open_client(
        target.address,
        ca=target.ca,
        certificate=target.certificate,
        key=target.key,
        patience_seconds=PATIENCE_SECONDS if patient else 0,
        start_patience_seconds=target.start_patience_seconds if patient else 0,
        on_lost=None if quiet else report_lost,
        on_refused=report_lost if sys.stderr is not None and sys.stderr.isatty() else None,
    )
