"""The program that runs all probes and prints each finding as one line of JSON.

    python -I -S -B -c '… main()' < {"controllers", "parent", "programs", "disks", …}

Like the launcher it is a process of its own, with one thread and only the standard library, and an
ordinary user is root of a user namespace in it. So what works here works in the launcher. Each
probe runs in a child (`sandbox.check.probing`). The program leaves no process, control group or
file behind.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

from jobworker.errors import HostUnsupported
from jobworker.sandbox.check import disks as probes_disks
from jobworker.sandbox.check import kernel as probes_kernel
from jobworker.sandbox.check import limits as probes_limits
from jobworker.sandbox.check import mounts as probes_mounts
from jobworker.sandbox.check.probing import (
    Finding,
    Probe,
    adopt_descendants,
    end_descendants,
    try_one,
)
from jobworker.sandbox.launcher.own_namespace import become_root, split
from jobworker.sandbox.user_namespaces import Ids


class ProbeSettings(NamedTuple):
    """The settings of the configuration that the probes need."""

    controllers: tuple[str, ...]
    """cgroup.enable_controllers."""
    parent: str
    """cgroup.parent."""
    programs: tuple[str, ...]
    """sandbox.programs."""
    disks: str
    """A directory on the file system of the jobs' disks."""
    first_uid: int
    """The first of 65,536 user ids that no job uses. An ordinary user does not need it."""
    jobs: int
    """How many jobs and spares share the ids of an ordinary user."""


def all_probes(probe_settings: ProbeSettings, ids: Ids, *, has_rights: bool) -> Iterator[Probe]:
    """All probes, in the order in which they run.

    `has_rights` is whether root runs them: only root can have disks in files.
    """
    yield from probes_kernel.probes(ids)
    yield from probes_mounts.probes(probe_settings.programs, ids, has_rights=has_rights)
    if has_rights:
        yield from probes_disks.probes(probe_settings.disks)
    yield from probes_limits.probes(probe_settings.controllers, probe_settings.parent)


def try_all(probe_settings: ProbeSettings) -> Iterator[Finding]:
    """Run all probes, and remove what killed ones have left. Yields each finding."""
    adopt_descendants()
    has_rights, ids = os.geteuid() == 0, Ids(probe_settings.first_uid)
    if not has_rights:
        try:
            ids = split(become_root(), probe_settings.jobs)
        except HostUnsupported as error:
            reason, remedy = error.message, error.remedy
            yield Finding("namespaces", "user namespace", False, True, reason, remedy)
            return  # all other probes need the rights of root in it
    try:
        for probe in all_probes(probe_settings, ids, has_rights=has_rights):
            yield try_one(probe)
            end_descendants()
    finally:
        probes_limits.sweep(probe_settings.controllers, probe_settings.parent, os.getpid())


def parse_probe_settings(text: str) -> ProbeSettings:
    """The settings in a text of `format_probe_settings`."""
    message = json.loads(text)
    return ProbeSettings(
        controllers=_texts(message["controllers"]),
        parent=str(message["parent"]),
        programs=_texts(message["programs"]),
        disks=str(message["disks"]),
        first_uid=int(message["first_uid"]),
        jobs=int(message["jobs"]),
    )


def format_probe_settings(probe_settings: ProbeSettings) -> str:
    """The settings as JSON, for the program's standard input."""
    return json.dumps(probe_settings._asdict())


def finding_from(line: str) -> Finding:
    """The finding in a line of the program's output."""
    return Finding(**json.loads(line))


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(item) for item in value)


def main() -> NoReturn:
    """Read the settings from standard input, run the probes and print their findings."""
    for finding in try_all(parse_probe_settings(sys.stdin.read())):
        print(json.dumps(finding._asdict()), flush=True)  # noqa: T201 - its output is its result
    sys.exit(0)
