"""The tree of errors: every class is told apart by its codes, and survives the wire."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import asyncclick as click
import pytest

from jobworker import errors
from jobworker.cli.worker_cli.main import worker_cli
from jobworker.errors import JobworkerError

SOURCE = Path(errors.__file__).parent


def _all_below(cls: type[JobworkerError]) -> list[type[JobworkerError]]:
    below = [each for child in cls.__subclasses__() for each in _all_below(child)]
    return [cls, *below]


CLASSES = [
    cls
    for cls in dict.fromkeys(_all_below(JobworkerError))
    if cls.__module__ == errors.__name__ and cls is not JobworkerError
]


def test_every_class_has_a_wire_code_and_a_name_of_its_own() -> None:
    for values in (Counter(cls.code for cls in CLASSES), Counter(cls.name for cls in CLASSES)):
        assert [value for value, times in values.items() if times > 1] == []


def test_wire_codes_are_those_of_json_rpc_or_ours() -> None:
    for cls in CLASSES:
        assert -32768 <= cls.code <= -32000 or 1000 <= cls.code < 2000


def test_exit_codes_keep_clear_of_success_usage_and_what_jobs_end_with() -> None:
    of_jobs = {errors.CommandNotFound: 127, errors.CommandNotExecutable: 126}
    for cls in CLASSES:
        assert cls.exit_code == of_jobs[cls] if cls in of_jobs else 64 <= cls.exit_code < 124


def test_situations_that_scripts_tell_apart_have_exit_codes_of_their_own() -> None:
    situations = [
        errors.ConnectionFailed,
        errors.CertificateRefused,
        errors.ServerUntrusted,
        errors.PermissionDenied,
        errors.NotFound,
        errors.InvalidParams,
        errors.Busy,
        errors.ConfigError,
        errors.SandboxError,
        errors.InternalError,
    ]
    assert len({cls.exit_code for cls in situations}) == len(situations)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_survives_the_wire(cls: type[JobworkerError]) -> None:
    sent = cls("cannot start: no", remedy="try again", data={"step": "execute", "errno": 2})
    data = {"name": sent.name, "remedy": sent.remedy, **sent.data}
    came = errors.error_from_wire(sent.code, sent.message, data)
    assert type(came) is cls
    assert (came.message, came.remedy, came.data) == (sent.message, sent.remedy, sent.data)


def test_code_that_is_not_known_becomes_an_internal_error() -> None:
    came = errors.error_from_wire(4711, "cannot do it: new", {"remedy": "upgrade"})
    assert type(came) is errors.InternalError
    assert str(came) == "cannot do it: new; upgrade"


def test_remedy_that_is_no_text_is_left_out() -> None:
    came = errors.error_from_wire(1003, "cannot find it", {"remedy": ["x"], "name": 7})
    assert (came.remedy, came.data) == ("", {})


def test_error_reads_as_its_message_and_what_to_do() -> None:
    assert (
        str(errors.NotFound("cannot find job 7: no such job")) == "cannot find job 7: no such job"
    )
    assert str(errors.Busy("cannot: full", remedy="wait")) == "cannot: full; wait"


def test_data_is_a_copy_of_what_was_given() -> None:
    data: dict[str, object] = {"step": "execute"}
    error = errors.SandboxError("cannot", data=data)
    data["step"] = "changed"
    assert error.data == {"step": "execute"}


def options_of(command: click.Command) -> set[str]:
    """The options of `worker-cli` and of all commands below it."""
    found = {name for each in command.params for name in each.opts if name.startswith("--")}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return found.union(*map(options_of, below))


def texts_of(module: Path) -> Iterator[str]:
    """The texts that a module's code holds, each as a whole: no docstrings."""
    waiting: list[ast.AST] = [ast.parse(module.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Constant | ast.JoinedStr):
            parts = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            yield "".join(str(part.value) for part in parts)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def test_options_of_the_command_line_are_named_as_such() -> None:
    """Callers of the Python API get the same errors."""
    unexplained = [
        (module.name, text)
        for module in SOURCE.rglob("*.py")
        if "cli" not in module.parts
        for text in texts_of(module)
        if options_of(worker_cli).intersection(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        if not re.search("worker-cli|worker certs|systemd-run|useradd", text)
    ]
    assert unexplained == []
