"""The examples in the client's docstrings, run as they stand, against a real service."""

import ast
import contextlib
import doctest
import inspect
import io
import re
import shutil
import sys
import traceback
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import trio

import jobworker
from jobworker.cli.worker.embedded_service import EmbeddedService
from jobworker.client import client as client_module
from jobworker.client import job as job_module
from jobworker.client import opening
from jobworker.model.job import JobSpec, Limits, Stream
from jobworker.model.lifecycle import State
from jobworker.protocol.messages import PruneParams

FLAGS = doctest.ELLIPSIS


def examples() -> list[doctest.DocTest]:
    """Every docstring with an example in the public modules."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for module in (client_module, job_module, opening):
        found += [test for test in finder.find(module) if test.examples]
    return found


async def outcome(code: CodeType, names: dict[str, Any]) -> str:
    """What an example prints, or the last line of what it raises."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result = eval(code, names)  # awaits stand in it, so it may make a coroutine
            if inspect.iscoroutine(result):
                await result
    except Exception as error:  # noqa: BLE001 - an example may show one
        return "".join(traceback.format_exception_only(error))
    return printed.getvalue()


async def run_example(test: doctest.DocTest, names: dict[str, Any]) -> None:
    checker = doctest.OutputChecker()
    for example in test.examples:
        code = compile(
            example.source, test.name, "single", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        got = await outcome(code, names)
        wanted = example.exc_msg or example.want
        assert checker.check_output(wanted, got, FLAGS), (
            f"{test.name}:\n{example.source}wanted {wanted!r}, got {got!r}"
        )


@pytest.mark.parametrize("test", examples(), ids=lambda test: test.name.rpartition("jobworker.")[2])
async def test_example_does_what_it_shows(service: EmbeddedService, test: doctest.DocTest) -> None:
    files = service.environment()
    names: dict[str, Any] = {
        "server": service.address,
        "ca": files["WORKER_CA_PATH"],
        "certificate": files["WORKER_CERT_PATH"],
        "key": files["WORKER_KEY_PATH"],
        **{cls.__name__: cls for cls in (JobSpec, Limits, PruneParams, State, Stream)},
        "open_client": jobworker.open_client,
        "__name__": test.name,
    }
    assert sys.displayhook is sys.__displayhook__
    credentials = {name: names[name] for name in ("ca", "certificate", "key")}
    with trio.fail_after(60):
        async with jobworker.open_client(service.address, **credentials) as client:
            job = await client.run(["sleep", "600"])
            names |= {"client": client, "job": job}
            try:
                await run_example(test, names)
            finally:
                await job.stop(grace_seconds=0)
                sleepers = await client.list(states=[State.RUNNING])
                for record in sleepers:
                    if record.spec.command == ("sleep", "60"):
                        await client.job(record.id).stop(grace_seconds=0)


def test_every_public_call_has_an_example() -> None:
    shown = {test.name.rpartition(".")[2] for test in examples()}
    for cls in (jobworker.Client, jobworker.Job):
        public = {
            name
            for name, value in vars(cls).items()
            if inspect.isfunction(value) and not name.startswith("_")
        }
        internal = {"call", "open_following", "serve", "aclose"}
        assert public - internal <= shown


async def test_program_of_the_readme_runs(service: EmbeddedService, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert program.count("worker.example.org:50051") == 1
    files = service.environment()
    for name, variable in (("ca-cert", "CA"), ("cert", "CERT"), ("key", "KEY")):
        shutil.copy(files[f"WORKER_{variable}_PATH"], tmp_path / f"{name}.pem")
    done = await trio.run_process(
        [sys.executable, "-c", program.replace("worker.example.org:50051", service.address)],
        cwd=tmp_path,
        capture_stdout=True,
    )
    assert done.stdout == b"stdout b'hello\\n'\nCOMPLETED\n"
