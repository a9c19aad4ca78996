"""Output as followers get it: exact bytes, from the start, then live, for any number."""

import base64
import hashlib
import json
import random

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService

from .wire import Json, Refused, Wire, open_socket, open_wire


async def test_bytes_are_exact_and_streams_apart(admin: Wire) -> None:
    script = (
        "import sys\nfor i in range(50):\n"
        "    sys.stdout.buffer.write(bytes(range(256))); sys.stdout.flush()\n"
        "    sys.stderr.buffer.write(b'\\xff\\x00no newline'); sys.stderr.flush()\n"
    )
    result = await admin.call("job.run", job={"command": ["python3", "-c", script]}, follow={})
    out, err, job = await admin.output(result["subscription"])
    assert out == bytes(range(256)) * 50
    assert err == b"\xff\x00no newline" * 50
    assert (job["stdout_bytes"], job["stderr_bytes"]) == (len(out), len(err))


async def test_large_output_is_complete(admin: Wire) -> None:
    size = 20_000_000
    script = f"import random; random.seed(5); print(end=random.randbytes({size}).hex())"
    result = await admin.call("job.run", job={"command": ["python3", "-c", script]}, follow={})
    out, _, job = await admin.output(result["subscription"])
    expected = random.Random(5).randbytes(size).hex().encode()
    assert hashlib.sha256(out).digest() == hashlib.sha256(expected).digest()
    assert job["discarded_bytes"] == 0


async def test_followers_that_join_at_any_time_get_everything(service: EmbeddedService) -> None:
    script = "for i in $(seq 1 60); do echo line $i; sleep 0.01; done"
    expected = "".join(f"line {i}\n" for i in range(1, 61)).encode()
    finished = 0

    async def follow(job: int, delay: float) -> None:
        nonlocal finished
        await trio.sleep(delay)
        async with open_wire(service) as wire:
            result = await wire.call("job.log", id=job)
            out, err, _ = await wire.output(result["subscription"])
        assert (out, err) == (expected, b"")
        finished += 1

    async with open_wire(service) as wire:
        job = await wire.start("sh", "-c", script)
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(follow, job, number * 0.12)
    assert finished == 12


async def test_output_comes_while_the_job_runs(admin: Wire) -> None:
    result = await admin.call(
        "job.run", job={"command": ["sh", "-c", "echo first; exec sleep 600"]}, follow={}
    )
    notes = admin.notes(result["subscription"])
    with trio.fail_after(60):
        note = await notes.receive()
    params, job = note["params"], result["job"]
    assert isinstance(params, dict)
    assert isinstance(job, dict)
    assert base64.b64decode(params["data"]) == b"first\n"
    assert (await admin.call("job.status", id=job["id"]))["state"] == "RUNNING"
    await admin.call("job.stop", id=job["id"])


async def test_log_without_follow_ends_at_once(admin: Wire) -> None:
    job = await admin.start("sh", "-c", "echo out; echo err >&2; exec sleep 600")
    with trio.fail_after(60):
        status = await admin.call("job.status", id=job)
        while not (status["stdout_bytes"] and status["stderr_bytes"]):  # each pipe is read alone
            status = await admin.call("job.status", id=job)
        result = await admin.call("job.log", id=job, follow=False)
        out, err, record = await admin.output(result["subscription"])
        result = await admin.call("job.log", id=job, follow=False, streams=["stdout"])
        only = await admin.output(result["subscription"])
    assert (out, err, record["state"]) == (b"out\n", b"err\n", "RUNNING")
    assert only[:2] == (b"out\n", b"")
    await admin.call("job.stop", id=job)


async def test_follower_resumes_at_its_offset(admin: Wire) -> None:
    out, _, job = await admin.run("sh", "-c", "echo 0123456789")
    assert out == "0123456789\n"
    result = await admin.call("job.log", id=job["id"], offset=4)
    rest, _, _ = await admin.output(result["subscription"])
    assert rest == b"456789\n"
    with pytest.raises(Refused, match="from byte 99"):
        await admin.call("job.log", id=job["id"], offset=99)


async def test_binary_messages_carry_the_same_bytes(service: EmbeddedService) -> None:
    job = {"command": ["sh", "-c", "printf 'a\\0b\\n\\377'; printf err >&2"]}
    params = {"job": job, "follow": {"encoding": "binary"}}
    streams = {"stdout": b"", "stderr": b""}
    async with open_socket(service) as socket:
        request = {"jsonrpc": "2.0", "id": "x", "method": "job.run", "params": params}
        await socket.send_message(json.dumps(request))
        while True:
            message = await socket.get_message()
            if isinstance(message, bytes):
                head, _, data = message.partition(b"\n")
                streams[json.loads(head)["params"]["stream"]] += data
            elif json.loads(message).get("method") == "job.output_end":
                break
    assert streams == {"stdout": b"a\0b\n\xff", "stderr": b"err"}


async def test_credit_bounds_what_is_sent(admin: Wire) -> None:
    _, _, job = await admin.run("sh", "-c", "head -c 300000 /dev/zero")
    delivery = {"credit_bytes": 1000}
    result = await admin.call("job.log", id=job["id"], delivery=delivery)
    number = result["subscription"]
    notes = admin.notes(number)
    first = await notes.receive()
    assert size_of(first) == 1000
    await admin.call("service.hello")
    assert notes.statistics().current_buffer_used == 0, "nothing beyond the credit"
    await admin.call("job.credit", subscription=number, bytes=299_000)
    total = 1000
    async for note in notes:
        if note["method"] == "job.output_end":
            break
        total += size_of(note)
    assert total == 300_000


def size_of(note: Json) -> int:
    params = note["params"]
    assert isinstance(params, dict)
    return len(base64.b64decode(params["data"]))


async def test_stalled_follower_delays_neither_job_nor_follower(
    service: EmbeddedService, admin: Wire
) -> None:
    script = "for i in $(seq 1 2000); do echo $i; done; head -c 5000000 /dev/zero"
    async with open_wire(service) as stalled:
        job = await admin.start("sh", "-c", script)
        await stalled.call("job.log", id=job, delivery={"credit_bytes": 1})
        result = await admin.call("job.log", id=job)
        with trio.fail_after(20):
            out, _, _ = await admin.output(result["subscription"])
        assert len(out) == 5_000_000 + sum(len(f"{i}\n") for i in range(1, 2001))


async def test_unfollow_ends_a_subscription(admin: Wire) -> None:
    job = await admin.start("sh", "-c", "while true; do echo x; sleep 0.01; done")
    result = await admin.call("job.log", id=job)
    await admin.notes(result["subscription"]).receive()
    await admin.call("job.unfollow", subscription=result["subscription"])
    with pytest.raises(Refused, match="has ended"):
        await admin.call("job.credit", subscription=result["subscription"], bytes=1)
    await admin.call("job.stop", id=job)


async def test_descendant_that_keeps_the_pipe_does_not_keep_the_job(admin: Wire) -> None:
    with trio.fail_after(20):
        out, _, job = await admin.run("sh", "-c", "setsid sleep 600 & echo done")
    assert (out, job["state"]) == ("done\n", "COMPLETED")
