"""The program that tries everything and prints what it found, one JSON object a line.

    python -I -S -B -c '… main()' < {"controllers", "parent", "programs", "first_uid"}

A process of its own, of one thread, with the standard library alone, as the launcher is: what
holds here holds there. Each probe runs in a child (`sandbox.probing`), and when all are done
nothing of them is left.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

from jobworker.sandbox import probes_kernel, probes_limits, probes_mounts
from jobworker.sandbox.probing import Finding, Probe, adopt_descendants, end_descendants, try_one


class Wanted(NamedTuple):
    """What of the configuration the probes have to know."""

    controllers: tuple[str, ...]
    parent: str
    programs: tuple[str, ...]
    first_uid: int
    """Begins a range of ids that no job uses."""


def all_probes(wanted: Wanted) -> Iterator[Probe]:
    """Every probe, in the order in which it is shown."""
    yield from probes_kernel.probes(wanted.first_uid)
    yield from probes_mounts.probes(wanted.programs, wanted.first_uid)
    yield from probes_limits.probes(wanted.controllers, wanted.parent)


def try_all(wanted: Wanted) -> Iterator[Finding]:
    """Try every probe, and take away what one that was killed has left."""
    adopt_descendants()
    try:
        for probe in all_probes(wanted):
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
        first_uid=int(message["first_uid"]),
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
