"""The protocol's page says what the code does."""

import json
import re
import subprocess
import sys
from pathlib import Path

from jobworker.protocol.methods import METHODS
from jobworker.protocol.session import ClientSession
from jobworker.sandbox.start.plan import ENVIRONMENT
from jobworker.serialization.convert import structure

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def test_page_is_what_the_code_would_write() -> None:
    done = subprocess.run(
        [sys.executable, "contrib/protocol_page.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_example_of_a_request_and_its_reply_is_sound() -> None:
    pairs = re.findall(r"^→ (.*)\n← (.*)$", PAGE, re.MULTILINE)
    seen = set()
    for request, reply in ((json.loads(sent), json.loads(came)) for sent, came in pairs):
        method = METHODS[request["method"]]
        if "error" not in reply:
            params: object = structure(method.params, request["params"])
            structure(method.result, reply["result"])
            session = ClientSession()
            session.call(method.name, params)
            assert session.receive(json.dumps(reply)) is not None
            seen.add(method.name)
    assert seen == set(METHODS)


def test_variables_that_are_named_are_those_of_a_job() -> None:
    (named,) = re.findall(r"the sandbox's own \((.*)…\)", PAGE)
    assert set(named.split(", ")) <= set(ENVIRONMENT)
