#!/usr/bin/env python3
"""Write the generated parts of docs/protocol.md; with --check, only check that they are up to date.

These are the methods, types, errors and limits (see `generated`). The rest of the page is written
by hand. A test fails if page and code differ.
"""

import json
from pathlib import Path
from typing import Any

import attrs
from generated import write_or_check

from jobworker.config.limits import ConnectionLimits
from jobworker.errors import TooManyFrames, error_classes
from jobworker.model.job import JobRecord
from jobworker.protocol.discovery import describe
from jobworker.protocol.methods import METHODS, Method
from jobworker.protocol.schema import REFERENCE, default_of, field_descriptions, first_line
from jobworker.server.connection import MAX_FRAGMENTS
from jobworker.server.connections.frame_scan import SMALL_BYTES
from jobworker.server.requests.conversation import SMALL_FRAMES_BURST, SMALL_FRAMES_PER_SECOND

PAGE = Path(__file__).parent.parent / "docs" / "protocol.md"

Json = Any

DOCUMENT = describe("")
TYPES: dict[str, Json] = DOCUMENT.components["schemas"]  # type: ignore[assignment]

SAMPLES: dict[str, Json] = {
    "id": 7,
    "subscription": 1,
    "bytes": 262_144,
    "size_bytes": 67_108_864,
    "VolumeSpec.name": "cache",
    "VolumeParams.name": "cache",
    "Volume.name": "cache",
    "command": ["ps", "aux"],
    "owner": "admin-client",
    "state": "RUNNING",
    "created_at": "2026-01-31T12:00:00Z",
    "started_at": "2026-01-31T12:00:00.004Z",
    "time": "2026-01-31T12:00:00.012Z",
    "version": "0.1.0",
    "Welcome.name": "admin-client",
    "role": "admin",
    "openrpc": "1.3.2",
    "info": {"title": "jobworker"},
    "methods": [],
    "components": {"schemas": {}},
}
"""Values for the examples, by the name of the member, or by class and member."""


def kind(schema: Json) -> str:
    """The text for a type, with its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REFERENCE)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema and "type" not in schema:
        return " or ".join(kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    name = str(schema.get("format", schema.get("type", "any")))
    if name == "array":
        name = f"list of {kind(schema['items'])}"
    elif name == "object":
        name = f"object of {kind(schema.get('additionalProperties', {}))}"
    return name + bounds(schema)


def bounds(schema: Json) -> str:
    """The text for a type's bounds, in parentheses; "" if it has none."""
    texts = []
    if {"const": 0} in schema.get("anyOf", []):
        inner = schema["anyOf"][1]
        texts.append(f"0, or {inner['minimum']:,} to {inner['maximum']:,}")
    if "maximum" in schema:
        texts.append(f"{schema['minimum']:,} to {schema['maximum']:,}")
    if "maxLength" in schema:
        texts.append(f"up to {schema['maxLength']:,} characters")
    if "maxItems" in schema:
        texts.append(f"{schema.get('minItems', 0):,} to {schema['maxItems']:,}")
    if "pattern" in schema:
        texts.append(f"`{schema['pattern'].replace('|', chr(92) + '|')}`")
    return f" ({', '.join(texts)})" if texts else ""


def table(properties: dict[str, Json], required: list[str]) -> list[str]:
    """The lines of a table of an object's members."""
    if not properties:
        return ["None."]
    lines = ["| member | type | default | |", "|---|---|---|---|"]
    for name, schema in properties.items():
        default = "" if name in required else f"`{json.dumps(schema.get('default'))}`"
        words = schema.get("description", "").replace("|", "\\|")
        lines.append(f"| `{name}` | {kind(schema)} | {default} | {words} |")
    return lines


def sample(cls: str, name: str, schema: Json, *, whole: bool) -> Json:
    """An example of a member of a class. With `whole` it includes optional members."""
    for key in (f"{cls}.{name}", name):
        if key in SAMPLES:
            return SAMPLES[key]
    if "$ref" in schema:
        return sample_of(schema["$ref"].removeprefix(REFERENCE), whole=whole)
    if "default" in schema:
        return schema["default"]
    if "anyOf" in schema:
        return sample(cls, name, schema["anyOf"][0], whole=whole)
    if schema.get("type") == "array":
        return [sample("", "", schema["items"], whole=whole)]
    plain: dict[str, Json] = {"integer": 0, "number": 0.5, "boolean": True, "object": {}}
    return plain.get(schema.get("type", ""), "text")


def sample_of(cls: str, *, whole: bool) -> Json:
    """An example of an object or an enumeration. A record inside has only its required members."""
    schema = TYPES[cls]
    if "enum" in schema:
        return schema["enum"][0]
    return {
        name: sample(cls, name, member, whole=whole and name not in ("job", "jobs"))
        for name, member in schema["properties"].items()
        if whole or name in schema["required"]
    }


def exchange(name: str, params: Json, result: Json) -> list[str]:
    """The lines of an example: a request and its reply."""
    request = {"jsonrpc": "2.0", "id": 1, "method": name, "params": params}
    reply = {"jsonrpc": "2.0", "id": 1, "result": result}
    return ["```", f"→ {json.dumps(request)}", f"← {json.dumps(reply)}", "```"]


def besides(row: Method) -> str:
    """The sentence on further permissions that some calls of a method need; "" if none does."""
    needs = [f"`{each.permission.value}` {each.when}" for each in row.conditions]
    return f" Some calls also need {'; '.join(needs)}." if needs else ""


def methods() -> list[str]:
    """The section of all methods."""
    lines = []
    for row, described in zip(METHODS.values(), DOCUMENT.methods, strict=True):
        params = TYPES[row.params.__name__]
        lines += [
            f"### `{row.name}`",
            "",
            f"{row.summary}. Permission: `{described['x-permission']}`.{besides(row)}",
            "",
        ]
        lines += [*table(params["properties"], params["required"]), ""]
        lines += [f"Result: [{row.result.__name__}](#{row.result.__name__.lower()}).", ""]
        whole = row.result is not JobRecord or row.name == "job.status"
        lines += exchange(
            row.name,
            sample_of(row.params.__name__, whole=False),
            sample_of(row.result.__name__, whole=whole),
        )
        lines.append("")
    return lines


def types() -> list[str]:
    """The section of all classes of messages, except parameters, which are with their methods."""
    params = {row.params.__name__ for row in METHODS.values()}
    lines = []
    for name in sorted(TYPES.keys() - (params - {"Nothing"})):
        schema = TYPES[name]
        lines += [f"### {name}", "", schema.get("description", ""), ""]
        if "enum" in schema:
            lines += ["One of " + ", ".join(f"`{json.dumps(v)}`" for v in schema["enum"]) + ".", ""]
        else:
            lines += [*table(schema["properties"], schema["required"]), ""]
    return lines


def errors() -> list[str]:
    """The section of all errors."""
    lines = ["| code | name | exit code of `worker-cli` | |", "|---|---|---|---|"]
    by_code = sorted(error_classes().items(), key=lambda pair: (pair[0] > 0, abs(pair[0])))
    for code, cls in by_code:
        lines.append(f"| {code} | `{cls.name}` | {cls.exit_code} | {first_line(cls)} |")
    return lines


REACHED = {
    "max_connections": ("too_many_connections", "HTTP 503"),
    "max_connections_per_certificate": ("too_many_connections", "HTTP 503"),
    "max_handshakes": ("too_many_handshakes", "closed"),
    "handshake_timeout": ("handshake_too_slow", "closed"),
    "max_failed_handshakes": (
        "too_many_failures",
        "slowed down; closed before TLS if too many wait",
    ),
    "max_message_bytes": ("message_too_large", "closed with 1009"),
    "max_requests_in_flight": ("too_many_requests", "the request's error"),
    "max_follows": ("too_many_follows", "the request's error"),
    "max_waits": ("too_many_requests", "the request's error; `too_many_follows` of a follow"),
    "ping_interval": ("", ""),
    "ping_timeout": ("ping_unanswered", "closed with 1013"),
}
"""The error of each limit, and what happens to a client that reaches it."""


def limits() -> list[str]:
    """The section of all keys of `[limits]`."""
    words = field_descriptions(ConnectionLimits)
    lines = ["| key in `[limits]` | default | error | effect | |", "|---|---|---|---|---|"]
    for limit in attrs.fields(ConnectionLimits):
        name, effect = REACHED[limit.name]
        error = f"`{name}`" if name else ""
        default = json.dumps(default_of(limit))
        lines.append(f"| `{limit.name}` | `{default}` | {error} | {effect} | {words[limit.name]} |")
    return lines


def frames() -> list[str]:
    """The section of the bounds on frames."""
    return [
        f"A message may have {MAX_FRAGMENTS:,} frames (beyond, the connection is cut).",
        f"A client may send {SMALL_FRAMES_BURST:,} control frames and unfinished parts of less",
        f"than {SMALL_BYTES:,} bytes at once, and then {SMALL_FRAMES_PER_SECOND} a second",
        f"(`{TooManyFrames.name}`, closed with 1013).",
    ]


SECTIONS = {
    "methods": methods,
    "types": types,
    "errors": errors,
    "limits": limits,
    "frames": frames,
}


if __name__ == "__main__":
    write_or_check(PAGE, SECTIONS, __doc__.partition("\n")[0])
