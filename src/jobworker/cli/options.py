"""Which server, and who we are to it: option, environment, file, default, in this order.

The file is `~/.worker/config`, lines as a shell would source them: `export NAME="value"`, with or
without `export`, `#` comments, quotes as in sh(1), `$NAME` and `${NAME}` outside of single quotes,
from the lines above or the environment; nothing else. A leading `~` of a path is the home
directory, quoted or not. Names that are not ours are passed over, so that a shell may source the
same file; one that begins with WORKER or looks like one of ours is refused, unless a later line
uses it. The file is read only where option and environment leave open which server or files.
"""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from attrs import define, field, frozen

from jobworker.client.address import Address, parse_address
from jobworker.errors import ConfigError
from jobworker.model.units import parse_duration

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
"""As long as a restart of the service takes: more would only keep a person waiting."""

_OURS = (*DEFAULTS, PATIENCE)

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@frozen(kw_only=True)
class Target:
    """A server, and the files by which client and server know one another."""

    address: Address
    certificate: Path
    key: Path
    ca: Path
    start_patience_seconds: float
    """How long a command waits for a server that nobody listens at."""


@define(eq=False)
class Invocation:
    """What the global options of one call of the program say."""

    options: dict[str, str] = field(factory=dict)
    """Values by variable name, those alone that were given."""
    json: bool = False

    def target(self) -> Target:
        """The server to dial. Raises ConfigError that names where a bad value stands."""
        return resolve(self.options, os.environ, Path(os.path.expanduser(f"{DIRECTORY}/config")))


def _start_patience(text: str, place: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(
            f"cannot use {PATIENCE} of {place}: {error}",
            remedy="give it as 30s or 2m, or 0 for no waiting",
        ) from None


def resolve(options: Mapping[str, str], environment: Mapping[str, str], file: Path) -> Target:
    """Find each setting in the first place that has it; empty variables count as unset."""
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
            f"cannot tell which server to dial: {fault} (from {place})",
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
    """The variables that `file` sets, {} where there is none; raises ConfigError with the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        why = os.strerror(error.errno or 0)
        allow = "let this user read it"
        remedy = allow if isinstance(error, PermissionError) else "put a file of text there"
        raise ConfigError(f"cannot read {file}: {why}", remedy=remedy) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"cannot read {file}: it is not UTF-8 text", remedy="convert it to UTF-8"
        ) from None
    found: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        names, used = _settings_of(line, where, {**os.environ, **found})
        found.update(names)
        unknown.update({name: where for name in names if name not in _OURS})
        for name in used:
            unknown.pop(name, None)
    for name, where in unknown.items():
        _refuse_misspelt(name, where)
    return found


def _refuse_misspelt(name: str, where: str) -> None:
    """Raise ConfigError for a name that was meant to be one of ours."""
    from difflib import get_close_matches

    likely = get_close_matches(name.upper(), _OURS, n=1, cutoff=0.8)
    if not likely and not name.upper().startswith("WORKER"):
        return
    raise ConfigError(
        f"cannot read {where}: {name} is no name that is known here",
        remedy=f"write {likely[0]}" if likely else f"give one of {', '.join(_OURS)}",
    )


def _settings_of(
    line: str, where: str, variables: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The variables that a line sets, and the names of those that it uses."""

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
            raise malformed(f"{word!r} is not NAME=value")
        value, unknown = _fill_in(value, names, variables)
        if unknown and name in _OURS:
            raise malformed(f"{unknown} in the value of {name} is no variable that is set here")
        if "\0" in value and name in _OURS:
            raise malformed(f"the value of {name} holds a NUL character")
        found[name] = value
    return found, names


_MARK = "\ue000"
"""Of a private use area: stands for a variable while quotes and blanks are looked at."""
_VARIABLE = re.compile(
    r"""(?P<plain>\\.|'[^']*')|\$(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\}|(?P<command>[({]))|(?P<tick>`)"""
)


def _mark_variables(line: str) -> tuple[str, list[str]]:
    """The line with a mark for each variable that a shell would replace, and what stood there."""
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
    """The value with its variables, and the first that nobody knows, "" where there is none."""
    unknown = ""

    def variable(found: re.Match[str]) -> str:
        nonlocal unknown
        name = names[int(found[1])]
        if name not in variables:
            unknown = unknown or f"${name.removeprefix('$')}"
        return variables.get(name, "")

    return re.sub(f"{_MARK}([0-9]+){_MARK}", variable, value), unknown
