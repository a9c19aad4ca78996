"""A service with tenants, for the attacks of this directory."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.pki.administration import init_authority
from jobworker.pki.authority import Authority
from jobworker.pki.files import write_new

from ..integration.conftest import open_directory, running

__all__ = ["open_directory"]

ROLES: dict[str, dict[str, object]] = {
    "roles.tenant": {
        "operations": ["view", "log", "run", "stop", "remove", "volumes"],
        "scope": "own",
    },
    "roles.watcher": {"operations": ["view", "log"], "scope": "own"},
    "roles.blind-runner": {"operations": ["run"], "scope": "own"},
    "roles.small": {
        "operations": ["view", "log", "run", "stop", "remove"],
        "max_jobs": 3,
        "max_cpu": 100,
        "max_memory": 64,
        "max_output": 2,
    },
    "roles.operator": {"operations": ["view", "stop"], "scope": "all"},
    "roles.cleaner": {"operations": ["view", "run", "remove"], "scope": "all"},
}
PEOPLE = {
    "alice": "tenant",
    "bob": "tenant",
    "carol": "watcher",
    "rita": "blind-runner",
    "olga": "operator",
    "rosa": "cleaner",
    "quinn": "small",
    "quentin": "small",
}


def make_people(directory: Path) -> Path:
    """Make an authority, and certificates of PEOPLE, for a service in `directory`."""
    certs, now = directory / "certs", datetime.now(UTC)
    init_authority(certs, [], now=now)
    authority = Authority.load(certs)
    for name, role in PEOPLE.items():
        write_new(certs, authority.issue_client(name, role, now=now).files(f"{name}-client"))
    return directory


@pytest.fixture(scope="session")
def tenants(open_directory: Callable[[], Path]) -> Iterator[EmbeddedService]:
    """A running service; `environment(NAME)` is that of each of PEOPLE, of admin and of viewer."""
    if os.geteuid() != 0:
        pytest.skip("needs root: namespaces and control groups")
    directory = make_people(open_directory())
    with running(directory, {"worker": {"max_concurrent_jobs": 20}, **ROLES}) as made:
        yield made
