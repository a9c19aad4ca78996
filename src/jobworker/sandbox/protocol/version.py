"""The version of what service and launcher say to one another.

Both tell theirs before anything else. They are one program, but an upgrade starts them anew one
after the other, and a launcher that outlives services may be older than the service that calls it.

Standard library only.
"""

PROTOCOL = 2
"""Raise it with every change of a request, reply or event that an earlier service or launcher
cannot do without; the rest has a default, and an unknown event is passed over. Version 1 told
none."""


def mismatch(launcher: object, service: object) -> str:
    """Why the two cannot work together; "" where they can."""
    if launcher == service:
        return ""
    return (
        f"it speaks version {launcher or 'unknown'} of their protocol, "
        f"the service version {service or 'unknown'}"
    )
