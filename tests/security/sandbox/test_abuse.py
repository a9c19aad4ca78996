"""Abuse: a job may harm itself and nobody else, and ends when it is told to.

Fork bombs, memory hogs, spinners and direct I/O as such stand in tests/integration/test_limits.py;
here is what goes around those limits. JOBWORKER_SOAK=1 (`make soak`) makes the numbers large.
"""

import base64
import os
import subprocess
import time

import pytest

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.sandbox.launcher.terminals import FEWEST, MOST

from ...integration.wire import Json, Refused, Wire

SOAK = bool(os.environ.get("JOBWORKER_SOAK"))
MIB = 1 << 20


def usage_of(job: Json) -> dict[str, int]:
    usage = job["usage"]
    assert isinstance(usage, dict)
    return usage


# --- processes ----------------------------------------------------------------------------------


async def test_thread_bomb_stops_at_its_limit_and_nowhere_else(admin: Wire) -> None:
    bomb = (
        "import threading, time, os\nthreading.stack_size(65536)\nmade = 0\ntry:\n"
        "    while made < 3000:\n"
        "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "        made += 1\nexcept RuntimeError: print('stopped after', made, flush=True)\n"
        "os._exit(0)\n"
    )
    out, err, _ = await admin.run("python3", "-c", bomb, limits={"processes": 50})
    assert out == "stopped after 49\n", err
    out, err, _ = await admin.run("python3", "-c", bomb, limits={"processes": 500})
    assert out == "stopped after 499\n", "the control: with a higher limit there are more"


async def test_terminals_run_out_inside_the_job_alone(admin: Wire) -> None:
    greedy = (
        "import os, time\nheld = []\ntry:\n"
        "    while True: held.append(os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY))\n"
        "except OSError as error: print(len(held), error, flush=True)\ntime.sleep(60)\n"
    )
    result = await admin.call("job.run", job={"command": ["python3", "-c", greedy]}, follow={})
    job = result["job"]
    assert isinstance(job, dict)
    told = (await admin.notes(result["subscription"]).receive())["params"]
    assert isinstance(told, dict)
    count, words = base64.b64decode(told["data"]).decode().split(maxsplit=1)
    assert FEWEST <= int(count) <= MOST, "of the host's 3,072"
    assert "No space left on device" in words
    try:
        script = "import os, pty; a, b = pty.openpty(); print(os.ttyname(b))"
        out, err, _ = await admin.run("python3", "-c", script)
        assert out == "/dev/pts/0\n", err
    finally:
        await admin.call("job.stop", id=job["id"], grace_seconds=0)


async def test_fork_bomb_leaves_room_for_neighbours_and_the_host(admin: Wire) -> None:
    bomb = (
        "import os, sys\nprint('going', flush=True)\n"
        "while True:\n    try: os.fork()\n    except OSError: pass\n"
    )
    limits = {"processes": 60, "cpu_percent": 40}
    result = await admin.call(
        "job.run", job={"command": ["python3", "-c", bomb], "limits": limits}, follow={}
    )
    job = result["job"]
    assert isinstance(job, dict)
    await admin.notes(result["subscription"]).receive()
    try:
        out, _, _ = await admin.run("sh", "-c", "echo a | cat | cat")
        assert out == "a\n"
        subprocess.run(["true"], check=True)  # noqa: ASYNC221
        now = await admin.call("job.status", id=job["id"])
        assert now["state"] == "RUNNING"
    finally:
        await admin.call("job.stop", id=job["id"], grace_seconds=0)
    stopped = await admin.call("job.status", id=job["id"])
    assert stopped["state"] == "STOPPED"


SPIN = (
    "import hashlib, sys, threading\nthreading.stack_size(65536)\n"
    "count = int(sys.argv[1])\n"
    "def spin():\n"  # without the interpreter's lock
    "    hashlib.pbkdf2_hmac('sha256', b'', b'', 300_000 // count)\n"
    "threads = [threading.Thread(target=spin) for _ in range(count)]\n"
    "for thread in threads: thread.start()\nfor thread in threads: thread.join()\n"
)


async def test_a_thousand_busy_threads_share_what_one_would_get(admin: Wire) -> None:
    for count in ("1000", "1"):
        began = time.monotonic()
        limits = {"cpu_percent": 10, "processes": 1100}
        _, err, job = await admin.run("python3", "-c", SPIN, count, limits=limits)
        assert job["exit_code"] == 0, err
        took = time.monotonic() - began
        assert usage_of(job)["cpu_ns"] / 1e9 <= 0.1 * took + 0.1, "a period more, at most"
        assert usage_of(job)["throttled_ns"] > 0
    _, _, job = await admin.run("python3", "-c", SPIN, "2", limits={"cpu_percent": 0})
    assert usage_of(job)["throttled_ns"] == 0, "the control: without a limit"


# --- memory and disk ----------------------------------------------------------------------------

HOGS = {
    "heap": "x = bytearray(200 << 20)",
    "mapped": (
        "import mmap; m = mmap.mmap(-1, 200 << 20)\nfor at in range(0, 200 << 20, 4096): m[at] = 1"
    ),
    "many_processes": (
        "import os, time\n"
        "for _ in range(10):\n"
        "    if os.fork() == 0: x = bytearray(20 << 20); time.sleep(60); os._exit(0)\n"
        "time.sleep(60)"
    ),
    "sysv_shared_memory": (
        "import ctypes; libc = ctypes.CDLL(None); libc.shmat.restype = ctypes.c_void_p\n"
        "size = 200 << 20; at = libc.shmat(libc.shmget(0, size, 0o600), None, 0)\n"
        "ctypes.memset(at, 1, size)"
    ),
    "memfd": (
        "import os; f = os.memfd_create('x')\nfor _ in range(200): os.write(f, bytes(1 << 20))"
    ),
    "tmpfs": "f = open('/run/x', 'wb')\nfor _ in range(200): f.write(bytes(1 << 20))",
    "pipes": (
        "import fcntl, os\n"
        "for _ in range(200):\n"
        "    r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 20); os.write(w, bytes(1 << 20))"
    ),
    "inodes": (
        "import os\n"
        "for number in range(400_000): os.close(os.open(f'/dev/shm/{number}', os.O_CREAT))"
    ),
}


@pytest.mark.parametrize("kind", HOGS)
async def test_memory_beyond_the_limit_ends_the_job_however_it_is_taken(
    admin: Wire, kind: str
) -> None:
    program = f"{HOGS[kind]}\nprint('got it', flush=True)"
    limits = {"memory_bytes": 48 * MIB}
    out, err, job = await admin.run("python3", "-c", program, limits=limits)
    assert "got it" not in out, job
    peak = usage_of(job)["memory_peak_bytes"]
    assert peak <= 48 * MIB
    # Pipes are bounded for each user before they are by memory: pipe(7), pipe-user-pages-soft.
    assert job["reason"] == "oom" or (kind == "pipes" and job["exit_code"] == 1), (err, job)


async def test_page_cache_is_given_back_and_ends_nothing(admin: Wire) -> None:
    script = "dd if=/dev/zero of=f bs=1M count=150 2>/dev/null && cat f > /dev/null && echo through"
    out, err, job = await admin.run("sh", "-c", script, limits={"memory_bytes": 48 * MIB})
    assert out == "through\n", (err, job)
    assert usage_of(job)["memory_peak_bytes"] <= 48 * MIB


async def test_memory_cannot_be_locked_beyond_its_bound(admin: Wire) -> None:
    script = (
        "import ctypes, mmap\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for size in (1 << 20, 64 << 20):\n"
        "    m = mmap.mmap(-1, size); at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "    print(libc.mlock(ctypes.c_void_p(at), size), ctypes.get_errno())\n"
    )
    out, err, _ = await admin.run("python3", "-c", script)
    assert out.splitlines() == ["0 0", "-1 12"], err


async def test_memory_file_system_is_full_at_its_bound(admin: Wire) -> None:
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=400 2>&1 | grep -c 'No space left'"
    out, _, _ = await admin.run("sh", "-c", script, limits={"memory_bytes": 600 * MIB})
    assert out == "1\n"


# --- output and names ---------------------------------------------------------------------------


async def test_endless_output_delays_no_one_and_ends_at_once(admin: Wire) -> None:
    job = await admin.start("yes", limits={"cpu_percent": 30})
    for _ in range(3):
        out, _, _ = await admin.run("echo", "beside it")
        assert out == "beside it\n"
    await admin.call("job.stop", id=job, grace_seconds=0)
    assert (await admin.call("job.status", id=job))["state"] == "STOPPED"


async def test_line_without_an_end_is_kept_whole(admin: Wire) -> None:
    size = (1024 if SOAK else 4) * MIB
    out, _, _ = await admin.run("sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x")
    assert len(out) == size
    assert out.count("x") == size


NASTY = "\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>\u202e\r\n\tlevel=ERROR msg=forged"


async def test_nasty_words_stay_what_they_are(admin: Wire, service: EmbeddedService) -> None:
    out, _, job = await admin.run("printf", "%s", NASTY)
    assert out == NASTY
    spec = job["spec"]
    assert isinstance(spec, dict)
    assert spec["command"] == ["printf", "%s", NASTY]
    lines = service.log_text().splitlines()
    assert not any(line.startswith("\tlevel=ERROR msg=forged") for line in lines)
    assert "\x1b" not in service.log_text()
    with pytest.raises(Refused, match="NUL"):
        await admin.start("echo", "a\0b")
