"""`worker check`: test everything that jobs and service need, and print the findings.

    probes of the kernel (sandbox.host_check)  →  the service's files  →  one whole job

The job is the proof: a launcher of the check's own starts a real job with the configured limits, by
the code that `worker serve` runs. The check removes all that it has made.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from jobworker.cli.command_line.failures import one_line, print_text
from jobworker.cli.worker import check_service
from jobworker.cli.worker.check_job import trial_ids, whole_jobs
from jobworker.cli.worker.check_service import nearest_directory
from jobworker.config.settings import Settings, load
from jobworker.errors import JobworkerError
from jobworker.sandbox.cgroup.hierarchy import step_into_leaf
from jobworker.sandbox.check.host_check import findings as host_findings
from jobworker.sandbox.check.main import ProbeSettings
from jobworker.sandbox.check.probing import Finding
from jobworker.serialization.json_text import dumps

_GROUPS = (
    "processes",
    "namespaces",
    "confinement",
    "mounts",
    "disks",
    "limits",
    "service",
    "a whole job",
)


async def run_check(config: Path | None, *, json: bool) -> int:
    """Test everything and print the findings. Returns 0 if all needed things are there, else 1."""
    step_into_leaf()  # as the service does, in a control group that is delegated to this user
    settings, about = _settings(config)
    found = [about]
    with trial_ids(settings) as first_uid:
        probe_settings = ProbeSettings(
            controllers=settings.cgroup.enable_controllers,
            parent=settings.cgroup.parent,
            programs=settings.sandbox.programs,
            disks=str(nearest_directory(Path(settings.worker.state_dir))),
            first_uid=first_uid,
            jobs=settings.worker.max_concurrent_jobs + settings.sandbox.spares,
        )
        found.extend(await host_findings(probe_settings))
        found.extend(check_service.findings(settings))
        found.extend(await whole_jobs(settings, first_uid))
    found.sort(key=lambda finding: _GROUPS.index(finding.group))
    lacking = [finding for finding in found if finding.needed and not finding.supported]
    if json:
        rows = [finding._asdict() for finding in found]
        print_text(dumps({"ok": not lacking, "mode": _mode(), "findings": rows}))
    else:
        print_text(table(found, _mode()))
    return 1 if lacking else 0


def _settings(config: Path | None) -> tuple[Settings, Finding]:
    """The settings to check with, and a finding about the file; the defaults if it is invalid."""
    if config is None:
        return Settings(), Finding("service", "configuration", True, True, "the defaults", "")
    try:
        return load(config), Finding("service", "configuration", True, True, str(config), "")
    except JobworkerError as error:
        fault = Finding("service", "configuration", False, True, error.message, error.remedy)
        return Settings(), fault


def _mode() -> str:
    if os.geteuid() == 0:
        return "root: each job gets a range of user ids of its own"
    return f"ordinary user (uid {os.geteuid()})"


def table(found: Sequence[Finding], mode: str) -> str:
    """The findings as text, group by group; a remedy stands below its finding."""
    width = max(len(finding.name) for finding in found)
    lines = [f"Mode: {mode}"]
    group = ""
    for finding in found:
        if finding.group != group:
            group = finding.group
            lines.append(f"\n{group}")
        word = "ok" if finding.supported else "MISSING" if finding.needed else "optional"
        detail = one_line(finding.detail)
        lines.append(f"  {word:8}  {finding.name:{width}}  {detail}")
        if finding.remedy:
            lines.append(f"  {'':8}  {'':{width}}  → {one_line(finding.remedy)}")
    lacking = sum(finding.needed and not finding.supported for finding in found)
    absent = sum(not finding.needed and not finding.supported for finding in found)
    needed = _missing(lacking, "needed") if lacking else "All that is needed is there"
    lines.append(f"\n{needed}; {_missing(absent, 'optional')}.")
    return "\n".join(lines)


def _missing(count: int, kind: str) -> str:
    return f"{count} {kind} {'thing is' if count == 1 else 'things are'} missing"
