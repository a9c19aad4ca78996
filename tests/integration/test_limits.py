"""Limits hold in the kernel: each is probed by a job that goes beyond it."""

import time

import pytest

from .wire import Json, Refused, Wire

MIB = 1 << 20


def usage_of(job: Json) -> dict[str, int]:
    usage = job["usage"]
    assert isinstance(usage, dict)
    return usage


async def test_memory_hog_ends_with_reason_oom(admin: Wire) -> None:
    command = ["python3", "-c", "x=b'x'*200_000_000; print('got it')"]
    out, _, job = await admin.run(*command, limits={"memory_bytes": 64 * MIB})
    assert (job["state"], job["reason"], out) == ("FAILED", "oom", "")
    assert usage_of(job)["memory_peak_bytes"] <= 64 * MIB
    out, _, job = await admin.run(*command, limits={"memory_bytes": 400 * MIB})
    assert (job["state"], out) == ("COMPLETED", "got it\n"), "the control: with room it runs"


async def test_hog_among_children_ends_the_whole_job(admin: Wire) -> None:
    script = "python3 -c 'x=b\"x\"*200_000_000' & wait; sleep 600"
    _, _, job = await admin.run("sh", "-c", script, limits={"memory_bytes": 64 * MIB})
    assert (job["state"], job["reason"]) == ("FAILED", "oom")


async def test_memory_file_systems_count_as_memory(admin: Wire) -> None:
    # "&&": v1 kills one process first, and the shell may get a word out before it is ended too.
    script = "head -c 100000000 /dev/zero > /dev/shm/x && echo wrote"
    out, _, job = await admin.run("sh", "-c", script, limits={"memory_bytes": 32 * MIB})
    assert (job["reason"], out) == ("oom", "")


async def test_limits_of_one_job_are_not_those_of_the_next(admin: Wire) -> None:
    # Spares are put under the limits of the job before: more, fewer and none must all be right.
    script = "python3 -c 'x=b\"x\"*90_000_000; print(len(x))'"
    for megabytes, state in ((64, "FAILED"), (300, "COMPLETED"), (64, "FAILED"), (0, "COMPLETED")):
        limits = {"memory_bytes": megabytes * MIB}
        for _ in range(4):  # spares made before and after this size became the usual one
            _, _, job = await admin.run("sh", "-c", script, limits=limits)
            assert job["state"] == state, (megabytes, job)


@pytest.mark.alone
async def test_spinners_share_half_a_core(admin: Wire) -> None:
    spin = (
        "import os, time\nos.fork()\nend = time.monotonic() + 3\n"
        "while time.monotonic() < end: pass\n"
    )

    async def percent(**limits: int) -> tuple[float, int]:
        """What a job got of a core, and how long its limit held it."""
        began = time.monotonic()
        _, _, job = await admin.run("python3", "-c", spin, limits=limits)
        # The job's time is a little less than ours: it has to be started and told of.
        usage = usage_of(job)
        return usage["cpu_ns"] / 1e7 / (time.monotonic() - began), usage["throttled_ns"]

    for _attempt in range(5):
        got, throttled_ns = await percent(cpu_percent=50)
        assert got <= 55
        if got >= 43:
            assert throttled_ns > 0
            break
        without, _ = await percent(cpu_percent=0)
        if without < 86:  # a busy host has no half a core for anybody
            break
    else:
        pytest.fail(f"it got {got:.0f} % of a core, and {without:.0f} % without a limit")


@pytest.mark.parametrize("direction", ["write", "read"])
async def test_direct_io_is_throttled(admin: Wire, direction: str) -> None:
    size, rate = 3 * MIB, MIB
    write = "dd if=/dev/zero of=f bs=64k count=48 oflag=direct 2>/dev/null"
    read = "dd if=f of=/dev/null bs=64k iflag=direct 2>/dev/null"
    script = {
        "write": write,
        "read": f"dd if=/dev/zero of=f bs=64k count=48 2>/dev/null; sync; {read}",
    }
    began = time.monotonic()
    _, err, job = await admin.run("sh", "-c", script[direction], limits={"io_bps": rate})
    seconds = time.monotonic() - began
    assert (job["exit_code"], err) == (0, "")
    assert size / seconds <= rate * 1.1
    assert usage_of(job)[f"{direction}_bytes"] >= size


async def test_unlimited_io_is_quick(admin: Wire) -> None:
    """The control of the test above."""
    write = "dd if=/dev/zero of=f bs=64k count=48 oflag=direct 2>/dev/null"
    for _attempt in range(20):  # a busy host makes one of several take longer
        began = time.monotonic()
        await admin.run("sh", "-c", write)
        seconds = time.monotonic() - began
        if seconds < 1.5:
            break
    assert seconds < 1.5


async def test_fork_bomb_stops_at_its_limit(admin: Wire) -> None:
    bomb = (
        "import os, time\nmade = 0\ntry:\n"
        "    while made < 500:\n"
        "        if os.fork() == 0: time.sleep(30)\n"
        "        made += 1\n"
        "except BlockingIOError: print('EAGAIN after', made, flush=True)\n"
        "os._exit(0)\n"
    )
    out, _, job = await admin.run("python3", "-c", bomb, limits={"processes": 20})
    assert out == "EAGAIN after 19\n"
    assert job["state"] == "COMPLETED"


async def test_stop_does_not_wait_for_throttled_io(admin: Wire) -> None:
    script = "dd if=/dev/zero of=f bs=4M count=8 oflag=direct"
    job = await admin.start("sh", "-c", script, limits={"io_bps": 8192})
    began = time.monotonic()
    await admin.call("job.stop", id=job, grace_seconds=0.5)
    assert time.monotonic() - began < 60, "4 MiB at 8 KiB/s take eight minutes"


@pytest.mark.parametrize(
    ("limits", "path"),
    [
        ({"cpu_percent": -1}, "limits.cpu_percent"),
        ({"cpu_percent": 800_000}, "limits.cpu_percent"),
        ({"cpu_percent": 10**12}, "limits.cpu_percent"),
        ({"memory_bytes": -1}, "limits.memory_bytes"),
        ({"memory_bytes": 1000}, "limits.memory_bytes"),
        ({"memory_bytes": 1 << 49}, "limits.memory_bytes"),
        ({"io_bps": 1}, "limits.io_bps"),
        ({"processes": -5}, "limits.processes"),
        ({"processes": 10**9}, "limits.processes"),
    ],
)
async def test_absurd_limit_is_refused_by_name(
    admin: Wire, limits: dict[str, int], path: str
) -> None:
    with pytest.raises(Refused) as refused:
        await admin.start("true", limits=limits)
    assert refused.value.code == -32602
    assert path in refused.value.message


async def test_smallest_limits_run_something(admin: Wire) -> None:
    limits = {"cpu_percent": 1, "memory_bytes": 4 * MIB, "io_bps": 4096, "processes": 1}
    out, _, job = await admin.run("echo", "small", limits=limits)
    assert (job["state"], out) == ("COMPLETED", "small\n")
