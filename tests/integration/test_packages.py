"""What people do in a root of their own: install packages, build, serve; nothing stays behind."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import trio

from ..e2e.restarting import free_port
from .wire import Wire

MIB = 1 << 20
ENVIRONMENT = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
"""How this host's own pip finds its registry, besides its configuration files."""
ROOMY = {"memory_bytes": 1024 * MIB, "cpu_percent": 0, "disk_bytes": 2048 * MIB}


def answers(*command: str) -> bool:
    """Whether a command that asks a registry works on the host: the control."""
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [word.replace("DIR", directory) for word in command],
            cwd=directory,
            capture_output=True,
            check=False,
            timeout=60,
        )
    return done.returncode == 0


@pytest.mark.timeout(300)
async def test_packages_are_installed_inside_and_not_outside(admin: Wire) -> None:
    apt = ("apt-get", "-o", "Dir::State::Lists=DIR", "-o", "Dir::Cache=DIR", "update")
    pip = ("/usr/bin/python3", "-m", "pip", "download", "-q", "--no-deps", "requests")
    scripts = {}
    if await trio.to_thread.run_sync(answers, *apt):
        scripts["apt"] = "apt-get update -q && apt-get install -qy hello && hello"
    if await trio.to_thread.run_sync(answers, *pip):
        scripts["venv"] = (
            "python3 -m venv v && v/bin/pip install -q requests && "
            "v/bin/python -c 'import requests; print(requests.__file__)'"
        )
        scripts["user"] = (
            "pip install -q --user --break-system-packages requests && "
            "python3 -c 'import requests; print(requests.__file__)'"
        )
    if not scripts:
        pytest.skip("needs a package registry that answers (apt or pip)")
    said: dict[str, str] = {}

    async def run(name: str, script: str) -> None:
        out, err, job = await admin.run(
            "sh", "-c", script, environment=ENVIRONMENT, limits=ROOMY, timeout_seconds=240
        )
        assert job["exit_code"] == 0, (name, out[-2000:], err[-2000:])
        said[name] = out

    async with trio.open_nursery() as nursery:
        for name, script in scripts.items():
            nursery.start_soon(run, name, script)
    if "apt" in said:
        assert said["apt"].endswith("Hello, world!\n")
        assert not Path("/usr/bin/hello").exists()
    if "venv" in said:
        assert said["venv"].startswith("/workspace/v/lib/")
        assert said["user"].startswith("/root/.local/lib/")


async def test_program_is_built_with_git_and_make(admin: Wire) -> None:
    for tool in ("git", "make", "cc"):
        if not any(Path(place, tool).exists() for place in ("/usr/bin", "/bin")):
            pytest.skip(f"needs {tool}")
    script = """
set -e
git init -q project; cd project
printf '#include <stdio.h>\\nint main(void) { puts("built"); return 0; }\\n' > main.c
printf 'main: main.c\\n\\tcc -o main main.c\\n' > Makefile
git add .; git -c user.name=a -c user.email=a@b commit -qm first
git clone -q . /tmp/build; make -s -C /tmp/build
for number in 1 2 3; do echo "$number"; done
exec /tmp/build/main
"""
    out, err, _ = await admin.run("bash", "-c", script)
    assert (out, err) == ("1\n2\n3\nbuilt\n", "")


async def test_server_on_the_hosts_network_is_reached_from_the_host(admin: Wire) -> None:
    port = free_port()
    script = f"echo canary > index.html; exec python3 -u -m http.server -b 127.0.0.1 {port}"
    result = await admin.call("job.run", job={"command": ["sh", "-c", script]}, follow={})
    await admin.notes(result["subscription"]).receive()  # it says when it listens
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join([piece async for piece in stream])
    assert answer.endswith(b"\r\n\r\ncanary\n")
    job = result["job"]
    assert isinstance(job, dict)
    await admin.call("job.stop", id=job["id"], grace_seconds=0)
