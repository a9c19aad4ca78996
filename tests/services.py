"""Services as tests start them: as `cli.worker.embedded_service` does, with few of the host's
programs for jobs.

A launcher goes through all that jobs are shown at its start, in search of what not everyone may
read. All of /usr is 140,000 names on a developer's machine: half a second of a processor, some
hundred times in a run. The session's `service` has the default, and so has each service that names
`sandbox.programs` itself.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from jobworker.cli.worker import embedded_service
from jobworker.cli.worker.embedded_service import EmbeddedService

Extra = Mapping[str, Mapping[str, object]]

FEW_PROGRAMS = (
    *("/usr/bin", "/usr/sbin", "/usr/lib64", f"/usr/lib/{os.uname().machine}-linux-gnu"),
    *map(str, sorted(Path("/usr/lib").glob("python3*"))),
)
"""Enough for what jobs of tests run."""


def open_embedded(
    directory: Path, extra: Extra | None = None, *, guarded: bool = False
) -> AbstractAsyncContextManager[EmbeddedService]:
    """See `cli.worker.embedded_service.open_embedded`."""
    return embedded_service.open_embedded(
        directory, with_few_programs(extra or {}), guarded=guarded
    )


def write_configuration(directory: Path, extra: Extra) -> Path:
    """See `cli.worker.embedded_service.write_configuration`."""
    return embedded_service.write_configuration(directory, with_few_programs(extra))


def with_few_programs(extra: Extra) -> dict[str, Mapping[str, object]]:
    """These settings, with FEW_PROGRAMS for jobs where they name no others."""
    return {**extra, "sandbox": {"programs": FEW_PROGRAMS, **extra.get("sandbox", {})}}
