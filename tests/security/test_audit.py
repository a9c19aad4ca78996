"""What somebody did, or tried to, stands in the audit log, and `worker audit` tells it."""

import json
import subprocess
from pathlib import Path

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService, program
from jobworker.jobs.history.audit import FILE

from ..integration.conftest import until
from ..integration.wire import Refused, open_wire
from .forgery import bare_context
from .test_certificates import dialled


def told(service: EmbeddedService, *arguments: str) -> list[dict[str, object]]:
    """What `worker audit` prints of a service that runs."""
    config = service.directory / "worker.toml"
    command = [*program("worker"), "audit", f"--config={config}", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


async def test_who_did_what_and_what_came_of_it(tenants: EmbeddedService) -> None:
    async with open_wire(tenants, "alice") as alice, open_wire(tenants, "bob") as bob:
        job = await alice.start("sleep", "600")
        with pytest.raises(Refused):
            await bob.call("job.stop", id=job)
        await alice.call("job.status", id=job)
        await alice.call("job.stop", id=job)
    want = [
        ("alice", "tenant", "job.run", "ok"),
        ("bob", "tenant", "job.stop", "not_found"),
        ("alice", "tenant", "job.stop", "ok"),
    ]
    await until(lambda: len(told(tenants, f"--job={job}")) >= len(want))
    rows = told(tenants, f"--job={job}")
    assert [(r["name"], r["role"], r["action"], r["outcome"]) for r in rows] == want
    assert rows[0]["detail"] == "sleep 600"
    assert all(str(row["peer"]).startswith("127.0.0.1:") for row in rows)
    assert all(row["serial"] for row in rows)
    assert told(tenants, "--who=bob", f"--job={job}") == [rows[1]]
    assert told(tenants, "--since=0s") == []
    text = (tenants.directory / "state" / "service" / FILE).read_text(encoding="ascii")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line for line in lines if line["job"] == job] == rows


async def test_message_that_is_no_call_is_noted(tenants: EmbeddedService) -> None:
    async with open_wire(tenants, "alice") as alice:
        for method, params in (
            ("job.pwn", {}),
            ("job.stop", {"id": "7"}),
            ("job.run", {"job": {"command": []}}),
        ):
            with pytest.raises(Refused):
                await alice.call(method, **params)

    def refused() -> list[dict[str, object]]:
        return [row for row in told(tenants, "--who=alice") if row["action"] == "request.refused"]

    await until(lambda: len(refused()) >= 3)
    rows = refused()
    assert [row["outcome"] for row in rows] == [
        "method_not_found",
        "invalid_params",
        "invalid_params",
    ]
    assert "job.pwn" in str(rows[0]["detail"])
    assert "job.stop: id" in str(rows[1]["detail"])
    assert all(row["serial"] and row["peer"] for row in rows)


async def test_refused_connection_is_noted(tenants: EmbeddedService) -> None:
    error = await dialled(tenants, bare_context(tenants.directory / "certs" / "ca-cert.pem"))
    assert error is not None
    await until(lambda: [r for r in told(tenants) if r["action"] == "connection.refused"])
    (row, *_) = [r for r in told(tenants) if r["action"] == "connection.refused"]
    assert "no certificate" in str(row["detail"])


def test_audit_log_is_for_root_alone(tenants: EmbeddedService) -> None:
    service = tenants.directory / "state" / "service"
    assert service.stat().st_mode & 0o077 == 0
    for name in (FILE, "history.db"):
        assert (service / name).stat().st_mode & 0o077 == 0


def test_without_a_history_it_says_so(tmp_path: Path) -> None:
    config = tmp_path / "worker.toml"
    config.write_text(f'[worker]\nstate_dir = "{tmp_path}"\n')
    command = [*program("worker"), "audit", f"--config={config}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "cannot read the audit log" in done.stderr
    assert list(tmp_path.iterdir()) == [config]
