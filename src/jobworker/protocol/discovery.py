"""The protocol's description of itself (`rpc.discover`): an OpenRPC document made of the table.

Source: https://spec.open-rpc.org/ (1.3.2). Facts for which OpenRPC has no member are in members
that begin with `x-`: a method's permission, and in `info` the server's notifications and errors.
"""

from jobworker.errors import JobworkerError, error_classes
from jobworker.protocol.messages import Discovery
from jobworker.protocol.methods import METHODS, NOTIFICATIONS, SUBPROTOCOL, Method
from jobworker.protocol.schema import Schema, Schemas, first_line

OPENRPC = "1.3.2"


def describe(version: str) -> Discovery:
    """Make the document for a service of this version."""
    schemas = Schemas()
    methods = [_method(row, schemas) for row in METHODS.values()]
    notifications = [
        {"name": row.name, "summary": row.summary, "params": schemas.of(row.params)}
        for row in NOTIFICATIONS.values()
    ]
    info = {
        "title": "jobworker",
        "version": version,
        "x-subprotocol": SUBPROTOCOL,
        "x-notifications": notifications,
        "x-errors": [_error(cls) for _, cls in sorted(error_classes().items())],
    }
    return Discovery(
        openrpc=OPENRPC,
        info=info,
        methods=tuple(methods),
        components={"schemas": schemas.definitions},
    )


def _method(row: Method, schemas: Schemas) -> Schema:
    schemas.of(row.params)
    named = schemas.definitions[row.params.__name__]
    properties, required = named["properties"], named["required"]
    assert isinstance(properties, dict)
    assert isinstance(required, list)
    return {
        "name": row.name,
        "summary": row.summary,
        "paramStructure": "by-name",
        "params": [
            {"name": name, "required": name in required, "schema": schema}
            for name, schema in properties.items()
        ],
        "result": {"name": row.result.__name__, "schema": schemas.of(row.result)},
        "x-permission": row.permission.value,
    }


def _error(cls: type[JobworkerError]) -> Schema:
    return {
        "code": cls.code,
        "name": cls.name,
        "description": first_line(cls),
        "x-exit-code": cls.exit_code,
    }
