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


class Wanted(NamedTuple):
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


def all_probes(wanted: Wanted, ids: Ids, *, has_rights: bool) -> Iterator[Probe]:
    """All probes, in the order in which they run.

    `has_rights` is whether root runs them: only root can have disks in files.
    """
    yield from probes_kernel.probes(ids)
    yield from probes_mounts.probes(wanted.programs, ids, has_rights=has_rights)
    if has_rights:
        yield from probes_disks.probes(wanted.disks)
    yield from probes_limits.probes(wanted.controllers, wanted.parent)


def try_all(wanted: Wanted) -> Iterator[Finding]:
    """Run all probes, and remove what killed ones have left. Yields each finding."""
    adopt_descendants()
    has_rights, ids = os.geteuid() == 0, Ids(wanted.first_uid)
    if not has_rights:
        try:
            ids = split(become_root(), wanted.jobs)
        except HostUnsupported as error:
            reason, remedy = error.message, error.remedy
            yield Finding("namespaces", "user namespace", False, True, reason, remedy)
            return  # all other probes need the rights of root in it
    try:
        for probe in all_probes(wanted, ids, has_rights=has_rights):
            yield try_one(probe)
            end_descendants()
    finally:
        probes_limits.sweep(wanted.controllers, wanted.parent, os.getpid())


def wanted_from(text: str) -> Wanted:
    """The settings in a text of `wanted_text`."""
    message = json.loads(text)
    return Wanted(
        controllers=_texts(message["controllers"]),
        parent=str(message["parent"]),
        programs=_texts(message["programs"]),
        disks=str(message["disks"]),
        first_uid=int(message["first_uid"]),
        jobs=int(message["jobs"]),
    )


def wanted_text(wanted: Wanted) -> str:
    """The settings as JSON, for the program's standard input."""
    return json.dumps(wanted._asdict())


def finding_from(line: str) -> Finding:
    """The finding in a line of the program's output."""
    return Finding(**json.loads(line))


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(item) for item in value)


def main() -> NoReturn:
    """Read the settings from standard input, run the probes and print their findings."""
    for finding in try_all(wanted_from(sys.stdin.read())):
        print(json.dumps(finding._asdict()), flush=True)  # noqa: T201 - its output is its result
    sys.exit(0)
