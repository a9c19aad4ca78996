"""`job.plan` and `run --dry-run`: the steps of a start, told and not taken."""

import json
import os
import subprocess

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService, program


def dry_run(service: EmbeddedService, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*program("worker-cli"), "run", "--dry-run", *arguments],
        env={**os.environ, **service.environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def listed(service: EmbeddedService) -> str:
    return subprocess.run(
        [*program("worker-cli"), "--json", "list"],
        env={**os.environ, **service.environment()},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_plan_names_the_steps_in_order_and_runs_nothing(service: EmbeddedService) -> None:
    before = listed(service)
    done = dry_run(service, "--json", "--max-memory=64", "sh", "-c", "echo secret-word")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    names = [step["name"] for step in plan["steps"]]
    order = ["attach-scope", "pivot-root", "enter-user-namespace", "filter-system-calls", "execute"]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    assert names[0] == "attach-scope"
    assert names[-1] == "execute"
    assert all(step["explanation"].endswith((".", "…")) for step in plan["steps"])
    assert plan["limits"]["memory_bytes"] == 64 << 20
    assert plan["limits"]["cpu_percent"] == 100  # the default, filled in
    assert "secret-word" not in done.stdout
    assert listed(service) == before


def test_plan_for_people_shows_what_the_job_asks_for(service: EmbeddedService) -> None:
    done = dry_run(service, "--network=none", "--user=7", "true")
    assert "CPU: 100 % of a core" in done.stdout
    assert "unshare-network" in done.stdout
    assert "set-user" in done.stdout
    assert "/proc/kcore" in done.stdout
    paths = [line for line in done.stdout.splitlines() if line.startswith(" " * 20)]
    assert max(map(len, paths)) <= 100
    plain = dry_run(service, "true")
    assert "unshare-network" not in plain.stdout
    assert "set-user" not in plain.stdout


@pytest.mark.parametrize(
    ("option", "word"), [("--max-cpu=1000000", "--max-cpu"), ("--runtime=nosuch", "nosuch")]
)
def test_plan_refuses_what_a_run_would(service: EmbeddedService, option: str, word: str) -> None:
    done = dry_run(service, option, "true")
    assert done.returncode == 65
    assert word in done.stderr
