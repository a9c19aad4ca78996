"""`--init`: a reaping init as PID 1, signals as everywhere else, and nothing to be had from it."""

import json
import os
import re
from pathlib import Path

from jobworker.cli.worker.embedded_service import EmbeddedService

from .conftest import until
from .test_cli import Cli
from .wire import Wire


async def test_program_has_an_init_in_front(admin: Wire) -> None:
    out, _, job = await admin.run("ps", "-eo", "pid,ppid,args", "--no-headers", init=True)
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert [line[2] for line in lines] == ["init", "ps -eo pid,ppid,args --no-headers"]
    assert (lines[0][0], lines[1][1]) == ("1", "1")
    assert (job["state"], job["exit_code"], job["signal"]) == ("COMPLETED", 0, None)


async def test_code_and_signal_of_the_program_are_the_jobs(admin: Wire) -> None:
    _, _, job = await admin.run("sh", "-c", "exit 7", init=True)
    assert (job["exit_code"], job["signal"], job["reason"]) == (7, None, "exit")
    _, _, job = await admin.run("sh", "-c", "kill -TERM $$", init=True)
    assert (job["exit_code"], job["signal"], job["reason"]) == (None, 15, "signal")
    _, _, job = await admin.run("sh", "-c", "kill -TERM $$; exit 3", init=False)
    assert (job["exit_code"], job["signal"]) == (3, None), "the control: PID 1 is spared its signal"


async def test_orphans_are_reaped(admin: Wire) -> None:
    script = """
import os, time
for _ in range(50):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
def state(n):
    try:
        return open(f"/proc/{n}/stat").read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "reaped since"
deadline = time.monotonic() + 20
while True:
    states = [state(n) for n in os.listdir("/proc") if n.isdigit()]
    if states.count("Z") == ZOMBIES or time.monotonic() > deadline:
        break
print(states.count("Z"))
"""
    for init, zombies in ((True, 0), (False, 50)):
        code = script.replace("ZOMBIES", str(zombies))
        out, err, _ = await admin.run("python3", "-c", code, init=init)
        assert out == f"{zombies}\n", err


async def test_stop_has_the_default_action_of_its_signal(admin: Wire) -> None:
    for name, number in (("TERM", 15), ("INT", 2), ("USR1", 10)):
        job = await admin.start("sleep", "600", init=True)
        ended = await admin.call("job.stop", id=job, signal=name, grace_seconds=60)
        assert (ended["state"], ended["signal"]) == ("STOPPED", number)


async def test_stop_lets_the_program_say_goodbye_and_takes_all_along(
    admin: Wire, service: EmbeddedService
) -> None:
    seconds = f"601.{os.getpid()}"
    sleeper = f"sleep\0{seconds}\0".encode()
    script = f"trap 'echo bye; exit 0' TERM; (trap '' TERM; sleep {seconds}) & echo ready; wait"
    job = {"command": ["bash", "-c", script], "init": True}
    result = await admin.call("job.run", job=job, follow={})
    number = result["job"]["id"]  # type: ignore[index]
    notes = admin.notes(result["subscription"])
    await notes.receive()
    sleepers = [p for p in Path("/proc").glob("[0-9]*") if _is(p, sleeper)]
    await admin.call("job.stop", id=number, grace_seconds=60)
    await until(lambda: not any(_is(p, sleeper) for p in sleepers))
    done = await admin.call("job.status", id=number)
    assert (done["exit_code"], done["stdout_bytes"]) == (0, len("ready\nbye\n"))


def _is(process: Path, command: bytes) -> bool:
    try:
        return (process / "cmdline").read_bytes() == command
    except OSError:
        return False


async def test_nothing_is_to_be_had_from_the_init(admin: Wire) -> None:
    script = """
import os
def attempt(what, do):
    try:
        print(what, "REACHED", do())
    except OSError as error:
        print(what, "refused")
attempt("exe", lambda: os.readlink("/proc/1/exe"))
attempt("open exe", lambda: open("/proc/1/exe", "rb"))
attempt("memory", lambda: open("/proc/1/mem", "rb"))
attempt("descriptor", lambda: open("/proc/1/fd/6", "wb"))
attempt("environment", lambda: open("/proc/1/environ", "rb").read() or 1 / 0)
attempt("root", lambda: os.readlink("/proc/1/root"))
attempt("maps", lambda: open("/proc/1/maps").read(1))
"""
    out, err, _ = await admin.run("python3", "-c", script, init=True)
    assert "REACHED" not in out, out
    assert out.count("refused") == 7, (out, err)


async def test_init_is_small_and_holds_no_pipe(admin: Wire, service: EmbeddedService) -> None:
    seconds = f"602.{os.getpid()}"
    command = f"sleep\0{seconds}\0".encode()
    job = await admin.start("sleep", seconds, init=True)
    # What is told as started is the init.
    await until(lambda: any(_is(p, command) for p in Path("/proc").glob("[0-9]*")))
    (sleeper,) = [p for p in Path("/proc").glob("[0-9]*") if _is(p, command)]
    parent = re.findall(r"^PPid:\s+(\d+)$", (sleeper / "status").read_text(), re.M)[0]
    init = Path("/proc") / parent
    assert _is(init, b"init\x00")
    kilobytes = int(re.findall(r"^Pss:\s+(\d+) kB", (init / "smaps_rollup").read_text(), re.M)[0])
    assert kilobytes <= 64
    assert sorted(entry.name for entry in (init / "fd").iterdir()) == ["6"]
    status = (init / "status").read_text()
    assert re.search(r"^Seccomp:\s+2$", status, re.M)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.M)
    await admin.call("job.stop", id=job)


async def test_limit_on_processes_is_the_programs_own(admin: Wire) -> None:
    for init in (True, False):
        out, _, _ = await admin.run("echo", "ran", init=init, limits={"processes": 1})
        assert out == "ran\n"


async def test_failed_start_is_told_by_its_step(admin: Wire, service: EmbeddedService) -> None:
    cli = Cli(service)
    done = cli("run", "--init", "/no/such/program")
    assert (done.returncode, done.stdout) == (127, "")
    assert "no such program" in done.stderr
    done = cli("run", "--init", "--quiet", "true")
    assert json.loads(cli("status", done.stdout.strip(), "--json").stdout)["spec"]["init"] is True
