"""The server's address and the client's files: from options, environment, file or defaults.

The first of these four that has a value wins. The file is `~/.worker/config`. It has lines that a
shell could source: `export NAME="value"`, with or without `export`, `#` comments, quotes as in
sh(1), and outside of single quotes `$NAME` and `${NAME}`, from the lines above or the environment.
It may contain nothing else. A leading `~` of a path is the home directory, quoted or not.

The reader ignores unknown names, so that a shell may source the same file. It refuses an unknown
name that begins with WORKER or resembles one of ours, because it is most likely misspelt, unless a
later line uses it. It reads the file only if options and environment leave a setting open.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import asyncclick as click
from attrs import define, field, frozen

from jobworker.client.address import Address, parse_address
from jobworker.errors import ConfigError, shortened
from jobworker.model.units import parse_duration
from jobworker.regular_file import NotText, read_text

DIRECTORY = "~/.worker"

SERVER, CERTIFICATE, KEY, CA = (
    "WORKER_SERVER",
    "WORKER_CERT_PATH",
    "WORKER_KEY_PATH",
    "WORKER_CA_PATH",
)
DEFAULTS = {
    SERVER: "127.0.0.1",
    CERTIFICATE: f"{DIRECTORY}/client-cert.pem",
    KEY: f"{DIRECTORY}/client-key.pem",
    CA: f"{DIRECTORY}/ca-cert.pem",
}

PATIENCE = "WORKER_PATIENCE"
DEFAULT_PATIENCE = "5s"
"""As long as a restart of the service takes. With more, a user would wait for a dead server."""

_OURS = (*DEFAULTS, PATIENCE)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@frozen(kw_only=True)
class Target:
    """A server, and the files by which client and server authenticate each other."""

    address: Address
    certificate: Path
    key: Path
    ca: Path
    start_patience_seconds: float
    """How long a command tries to reach a server that does not listen."""


@define(eq=False)
class Invocation:
    """The global options of one run of the program."""

    options: dict[str, str] = field(factory=dict)
    """The given values, by the name of the variable that each option replaces."""
    json: bool = False

    def target(self) -> Target:
        """The server to connect to. Raises ConfigError, which names the place of a bad value."""
        return resolve(self.options, os.environ, Path(os.path.expanduser(f"{DIRECTORY}/config")))


def _start_patience(text: str, place: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(
            f"cannot use {PATIENCE} of {place}: {error}",
            remedy="write it as 30s or 2m, or 0 for no wait",
        ) from None


def resolve(options: Mapping[str, str], environment: Mapping[str, str], file: Path) -> Target:
    """Take each setting from the first place that has it; an empty variable counts as unset."""
    places = [("its option", options), ("the environment", environment)]
    if any(not options.get(name) and not environment.get(name) for name in DEFAULTS):
        places.append((str(file), read_settings(file)))
    places.append(("the defaults", {**DEFAULTS, PATIENCE: DEFAULT_PATIENCE}))

    def find(name: str) -> tuple[str, str]:
        return next((place, held[name]) for place, held in places if held.get(name))

    def path(name: str) -> Path:
        return Path(os.path.expanduser(find(name)[1]))

    place, server = find(SERVER)
    try:
        address = parse_address(server)
    except ValueError as fault:
        raise ConfigError(
            f"cannot use the server's address: {fault} (from {place})",
            remedy="give --server or WORKER_SERVER as HOST, HOST:PORT or [IPv6]:PORT",
        ) from None
    patience, patience_text = find(PATIENCE)
    return Target(
        address=address,
        certificate=path(CERTIFICATE),
        key=path(KEY),
        ca=path(CA),
        start_patience_seconds=_start_patience(patience_text, patience),
    )


def read_settings(file: Path) -> dict[str, str]:
    """Read the variables that `file` sets; {} if it does not exist.

    Raises ConfigError, which names the line.
    """
    try:
        lines = read_text(file).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        why = error.strerror or str(error)
        allow = "let this user read it"
        remedy = allow if isinstance(error, PermissionError) else "put a text file there"
        raise ConfigError(f"cannot read {file}: {why}", remedy=remedy) from None
    except NotText as fault:
        raise ConfigError(
            f"cannot read {file}: {fault}", remedy="convert it to UTF-8 without a byte order mark"
        ) from None
    found: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        names, used = _read_line(line, where, {**os.environ, **found})
        found.update(names)
        unknown.update({name: where for name in names if name not in _OURS})
        for name in used:
            unknown.pop(name, None)
    for name, where in unknown.items():
        _refuse_misspelt(name, where)
    return found


def _refuse_misspelt(name: str, where: str) -> None:
    """Raise ConfigError for a name that is probably a misspelt one of ours."""
    from difflib import get_close_matches

    likely = get_close_matches(name.upper(), _OURS, n=1, cutoff=0.8)
    if not likely and not name.upper().startswith("WORKER"):
        return
    raise ConfigError(
        f"cannot read {where}: {shortened(name)} is not a known name",
        remedy=f"write {likely[0]}" if likely else f"give one of {', '.join(_OURS)}",
    )


def _read_line(
    line: str, where: str, variables: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Parse one line: the variables that it sets, and the names of those that it uses."""

    def malformed(why: str) -> ConfigError:
        return ConfigError(
            f"cannot read {where}: {why}", remedy='write lines such as export NAME="value"'
        )

    try:
        marked, names = _mark_variables(line)
        words = shlex.split(marked, comments=True)
    except ValueError as fault:
        raise malformed(str(fault).lower()) from None
    if words[:1] == ["export"]:
        words = words[1:] or [""]
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise malformed(f"{shortened(word)!r} is not NAME=value")
        value, unknown = _fill_in(value, names, variables)
        if unknown and name in _OURS:
            why = _NOT_EXPANDED.get(unknown, f"{shortened(unknown)} is not set")
            raise malformed(f"cannot use the value of {name}: {why}")
        if "\0" in value and name in _OURS:
            raise malformed(f"the value of {name} contains a NUL character")
        found[name] = value
    return found, names


_MARK = "\ue000"
"""A private-use character: it replaces variables while shlex parses quotes and blanks."""
_VARIABLE = re.compile(
    r"""(?P<plain>\\.|'[^']*')|\$(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\}|(?P<command>[({]))|(?P<tick>`)"""
)


_COMMAND = "it contains a command, and only a shell would run it"
_NOT_EXPANDED = {
    "$(": _COMMAND,
    "`": _COMMAND,
    "${": "it contains a form of ${…} that only a shell knows; write $NAME or ${NAME}",
}
"""Why the value has no result, by what begins the part that a shell would expand."""


def _mark_variables(line: str) -> tuple[str, list[str]]:
    """Replace each variable that a shell would expand by a mark: the line, and their names."""
    names: list[str] = []
    within = False

    def mark(found: re.Match[str]) -> str:
        nonlocal within
        names.append(found["name"] or found["braced"] or found[0])
        return f"{_MARK}{len(names) - 1}{_MARK}"

    parts, at = [], 0
    while at < len(line):
        found = _VARIABLE.match(line, at)
        if line[at] == '"':
            within = not within
        if found is None or (within and line[at] == "'"):
            parts.append(line[at])
            at += 1
            continue
        parts.append(found[0] if found["plain"] else mark(found))
        at = found.end()
    return "".join(parts), names


def _fill_in(value: str, names: list[str], variables: Mapping[str, str]) -> tuple[str, str]:
    """Replace the marks by values: the result, and the first that has none, "" if all have one."""
    unknown = ""

    def variable(found: re.Match[str]) -> str:
        nonlocal unknown
        name = names[int(found[1])]
        if name not in variables:
            unknown = unknown or (name if name in _NOT_EXPANDED else f"${name}")
        return variables.get(name, "")

    return re.sub(f"{_MARK}([0-9]+){_MARK}", variable, value), unknown


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


def _ask_for_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Invocation).json = True


def json_option() -> "Callable[[click.decorators.FC], click.decorators.FC]":
    """Add `--json`, which may stand before a command or among its options."""
    return click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_ask_for_json,
        help="Print JSON for programs instead of text for people.",
    )
