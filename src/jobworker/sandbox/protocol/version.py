"""The version of the protocol between service and launcher.

Each sends its version before anything else. They are one program, but an upgrade restarts one after
the other. So a launcher that outlives services may be older than the service that connects to it.

Standard library only.
"""

PROTOCOL = 2
"""Raise it with each change of a request, reply or event that an earlier service or launcher cannot
work with. Any other new field has a default, and an unknown event is ignored. A launcher of version
1 sent no version."""


def mismatch(launcher: object, service: object) -> str:
    """Why launcher and service cannot work together; "" if they can."""
    if launcher == service:
        return ""
    return (
        f"it speaks version {launcher or 'unknown'} of their protocol, "
        f"the service version {service or 'unknown'}"
    )
