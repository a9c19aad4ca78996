"""Reload on SIGHUP: configuration, certificates and revocation list are exchanged, all or nothing.

Certificates, key, CA, revocation list, the lowest TLS version, roles and logging change at once. If
another setting has changed, the log names it, and it takes effect at the next start. If any of the
files has a fault, everything stays as it was, and the log has the reason.
"""

import logging
import signal
import time
from datetime import UTC, datetime
from typing import NoReturn

import attrs
import trio
from attrs import frozen

from jobworker.config.roles import role_table
from jobworker.config.settings import Settings
from jobworker.errors import JobworkerError
from jobworker.incidents import Incidents
from jobworker.pki.expiry import expiry_warnings
from jobworker.pki.server_files import ServerFiles
from jobworker.server.access.auditor import Auditor
from jobworker.server.access.connected_clients import ConnectedClients, TlsState
from jobworker.server.reporting.logs import set_up_logging
from jobworker.server.reporting.notify import Notifier
from jobworker.server.startup.configuration_reader import (
    NAME,
    ConfigurationReader,
    ConfigurationSnapshot,
)
from jobworker.server.startup.process_setup import take_deferred_hangup
from jobworker.threads import in_thread

log = logging.getLogger("jobworker.server")

REFUSED = "reload refused; all stays as it was"
DAY_SECONDS = 86_400.0
_CHANGE_UNDER_WAY = ("security", "roles", "logging")
_FROM_THE_COMMAND_LINE = ("launcher",)


@frozen(kw_only=True)
class ReloadContext:
    """The parts of the service that a reload uses and changes."""

    reader: ConfigurationReader
    clients: ConnectedClients
    notifier: Notifier
    auditor: Auditor
    incidents: Incidents


async def serve_reloads(
    context: ReloadContext,
    settings: Settings,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Reload at each SIGHUP; never returns. `settings` are those that the service started with.

    A SIGHUP that came while the service started counts too: the service may have read its files
    before it.
    """
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        if take_deferred_hangup():
            await reload(context, settings)
        async for _ in signals:
            await reload(context, settings)


async def reload(context: ReloadContext, started_with: Settings) -> None:
    """Read the configuration and its files again, and use them from now on. Raises nothing.

    The log names the settings that differ from `started_with` and need a new start.

    This is a boundary for faults: an exception would end the receiver of signals, and the next
    SIGHUP would end the process.
    """
    notifier, auditor = context.notifier, context.auditor
    monotonic = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    await notifier.notify(RELOADING="1", MONOTONIC_USEC=str(monotonic))
    status = "reloaded"
    try:
        reading = await context.reader.read()
        tls_state = await in_thread(TlsState.of, reading.files, reading.settings.security)
        await context.clients.reauthorize(tls_state, role_table(reading.settings.roles))
    except JobworkerError as error:
        status = REFUSED
        auditor.service("service.reload", error.name, error.message)
        log.error("cannot reload, so all stays as it was: %s", error)
    except Exception:  # noqa: BLE001 - recorded
        status = REFUSED
        incident = context.incidents.record("reload")
        auditor.service("service.reload", "internal", f"incident {incident}")
    else:
        auditor.service("service.reload")
        try:
            await _report(reading, started_with)
        except Exception:  # noqa: BLE001 - recorded
            context.incidents.record("reload", "the report on a reload, which has taken effect")
    await notifier.notify(READY="1", STATUS=status)


async def _report(reading: ConfigurationSnapshot, started_with: Settings) -> None:
    settings = reading.settings
    set_up_logging(settings.logging.level, settings.logging.format)
    log.info("reloaded: certificates, revocation list, roles and logging")
    for key in _waiting_for_a_start(started_with, settings):
        log.warning("%s has changed; it takes effect when the service is started anew", key)
    await warn_of_expiry(reading.files)


def _waiting_for_a_start(before: Settings, now: Settings) -> list[str]:
    changed = []
    for section in attrs.fields(Settings):
        if section.name in (*_CHANGE_UNDER_WAY, *_FROM_THE_COMMAND_LINE):
            continue
        old, new = getattr(before, section.name), getattr(now, section.name)
        if attrs.has(type(old)):
            changed += [
                f"{section.name}.{key.name}"
                for key in attrs.fields(type(old))
                if getattr(old, key.name) != getattr(new, key.name)
            ]
        elif old != new:  # a table whose keys are names that the administrator chose
            changed.append(section.name)
    return changed


async def warn_of_expiry(files: ServerFiles) -> None:
    """Log a warning for each certificate or list that expires soon.

    A list may have a hundred thousand entries, so a thread reads it.
    """
    for warning in await in_thread(expiry_warnings, files, datetime.now(UTC)):
        log.warning("%s", warning)


async def report_reader_end(
    reader: ConfigurationReader, notifier: Notifier, auditor: Auditor
) -> NoReturn:
    """Log, audit and notify when the reader ends, since no reload is possible then; never returns.

    The service does not start the reader anew: that takes root's rights, which it has given up.
    """
    await reader.wait_gone()
    log.error(
        "the process that reads configuration and certificates again (%s) has ended: everything "
        "goes on as it is, and SIGHUP is refused until the service is started anew",
        NAME,
    )
    auditor.service("service.reader_ended")
    await notifier.notify(STATUS="serving; cannot reload: start the service anew")
    await trio.sleep_forever()
    raise AssertionError("unreachable")


async def warn_of_expiry_daily(reader: ConfigurationReader) -> None:
    """Log the warnings of `warn_of_expiry` once a day; never returns."""
    while True:
        await trio.sleep(DAY_SECONDS)
        try:
            await warn_of_expiry((await reader.read()).files)
        except JobworkerError as error:
            log.warning("%s", error)
