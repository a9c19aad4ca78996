"""The program that tries everything and prints what it found, one JSON object a line.

    python -I -S -B -c '… main()' < {"controllers", "parent", "programs", "disks", …}

A process of its own, of one thread, with the standard library alone, as the launcher is: what
holds here holds there, for an ordinary user as root of a namespace of its own. Each probe runs in
a child (`sandbox.check.probing`), and when all are done nothing of them is left.
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
    """What of the configuration the probes have to know."""

    controllers: tuple[str, ...]
    parent: str
    programs: tuple[str, ...]
    disks: str
    """A directory where the service's disks for jobs will be."""
    first_uid: int
    """Begins a range of ids that no job uses; for root."""
    jobs: int
    """Between so many the ids of an ordinary user are shared out."""


def all_probes(wanted: Wanted, ids: Ids, *, has_rights: bool) -> Iterator[Probe]:
    """Every probe, in the order in which it is shown."""
    yield from probes_kernel.probes(ids)
    yield from probes_mounts.probes(wanted.programs, ids, has_rights=has_rights)
    if has_rights:
        yield from probes_disks.probes(wanted.disks)
    yield from probes_limits.probes(wanted.controllers, wanted.parent)


def try_all(wanted: Wanted) -> Iterator[Finding]:
    """Try every probe, and take away what one that was killed has left."""
    adopt_descendants()
    has_rights, ids = os.geteuid() == 0, Ids(wanted.first_uid)
    if not has_rights:
        try:
            ids = split(become_root(), wanted.jobs)
        except HostUnsupported as error:
            reason, remedy = error.message, error.remedy
            yield Finding("namespaces", "user namespace", False, True, reason, remedy)
            return  # all the rest is tried as root of it
    try:
        for probe in all_probes(wanted, ids, has_rights=has_rights):
            yield try_one(probe)
            end_descendants()
    finally:
        probes_limits.sweep(wanted.controllers, wanted.parent, os.getpid())


def wanted_from(text: str) -> Wanted:
    """Read what `wanted_text` wrote."""
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
    """What the program reads."""
    return json.dumps(wanted._asdict())


def finding_from(line: str) -> Finding:
    """A line that the program wrote."""
    return Finding(**json.loads(line))


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(item) for item in value)


def main() -> NoReturn:
    """Read what is wanted from standard input and print what there is."""
    for finding in try_all(wanted_from(sys.stdin.read())):
        print(json.dumps(finding._asdict()), flush=True)  # noqa: T201 - this is its answer
    sys.exit(0)
