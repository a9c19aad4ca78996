"""JSON-RPC to the letter, on a real connection: what is answered, what is not, and with what."""

import json

import pytest
import trio

from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.protocol.methods import METHODS

from .wire import Json, Wire, open_socket

HELLO = '{"jsonrpc":"2.0","id":ID,"method":"service.hello"}'


async def texts_of(admin: Wire, subscription: object) -> tuple[dict[str, str], list[Json]]:
    """What each stream reads in the end, and the parameters of each piece."""
    read, pieces = {"stdout": "", "stderr": ""}, list[Json]()
    async for note in admin.notes(subscription):
        params = note["params"]
        assert isinstance(params, dict)
        if note["method"] == "job.output_end":
            assert params["error"] is None
            assert params["offset"] == sum(int(str(piece["bytes"])) for piece in pieces)
            return read, pieces
        read[params["stream"]] += params["text"]
        pieces.append(params)
    raise AssertionError("the subscription ended without a word")


async def test_text_is_whole_though_its_characters_are_torn_apart(admin: Wire) -> None:
    text = "aé€😀" * 2000
    script = f"import sys; sys.stdout.write({text!r}); sys.stderr.buffer.write(b'x\\xff\\xe2\\x82')"
    job = {"command": ["python3", "-X", "utf8", "-c", script]}
    follow = {"encoding": "text", "credit_bytes": 1}
    result = await admin.call("job.run", job=job, follow=follow)
    grant = {"subscription": result["subscription"], "bytes": 3}
    for _ in range(7000):  # three bytes at a time: characters of four are torn for sure
        await admin.notify("job.credit", **grant)
    read, pieces = await texts_of(admin, result["subscription"])
    assert read == {"stdout": text, "stderr": "x\ufffd\ufffd"}
    assert len(pieces) > 1000


async def test_notification_is_never_answered(service: EmbeddedService) -> None:
    async with open_socket(service) as socket:
        for method in ("no.such", "job.wait", "job.status", "service.hello"):
            await socket.send_message(json.dumps({"jsonrpc": "2.0", "method": method}))
        await socket.send_message(
            '{"jsonrpc":"2.0","method":"job.status","params":{"id":4611686018427387904}}'
        )
        await socket.send_message('{"jsonrpc":"2.0","id":null,"method":"service.hello"}')
        with trio.fail_after(60):
            reply = json.loads(await socket.get_message())
        assert reply["id"] is None
        assert reply["result"]["role"] == "admin"


@pytest.mark.parametrize("id_", ["1.5", '"é"', "-7", "0"])
async def test_id_comes_back_as_it_was(service: EmbeddedService, id_: str) -> None:
    async with open_socket(service) as socket:
        await socket.send_message(HELLO.replace("ID", id_))
        with trio.fail_after(60):
            assert json.loads(await socket.get_message())["id"] == json.loads(id_)


async def test_service_describes_its_protocol(admin: Wire) -> None:
    document = await admin.call("rpc.discover")
    assert [method["name"] for method in document["methods"]] == list(METHODS)  # type: ignore[attr-defined]
    run = document["components"]["schemas"]["JobSpec"]  # type: ignore[index]
    assert run["required"] == ["command"]
    assert run["properties"]["command"]["description"].startswith("The program")


async def test_fault_is_told_with_its_path(service: EmbeddedService) -> None:
    job = {"command": ["true"], "limits": {"cpu_percent": "50"}, "environment": {"A": 1}}
    async with open_socket(service) as socket:
        request = {"jsonrpc": "2.0", "id": 1, "method": "job.run", "params": {"job": job}}
        await socket.send_message(json.dumps(request))
        with trio.fail_after(60):
            error = json.loads(await socket.get_message())["error"]
    assert error["code"] == -32602
    assert error["data"]["faults"] == [
        {"path": "job.environment['A']", "problem": "must be a string, not an integer"},
        {"path": "job.limits.cpu_percent", "problem": "must be an integer, not a string"},
    ]
