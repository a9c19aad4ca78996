"""Render certificates as text for people and as JSON for programs. Pure."""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from jobworker.cli.command_line.failures import one_line as visible
from jobworker.serialization.convert import unstructure
from jobworker.serialization.json_text import dumps

if TYPE_CHECKING:
    from jobworker.pki.registry import CertificateEntry


def as_json(entries: "Sequence[CertificateEntry]") -> str:
    """Render entries of the registry as one line of JSON, a list."""
    return dumps([unstructure(entry) for entry in entries])


def _who(entry: "CertificateEntry") -> str:
    if entry.kind == "server":
        return f"server for {', '.join(entry.hosts)}"
    return visible(f"{entry.name} ({entry.role})")


def issued(entry: "CertificateEntry") -> str:
    """The line about a certificate that was just issued."""
    return f"Issued {entry.serial} to {_who(entry)}, valid until {entry.not_after:%Y-%m-%d}"


def revoked(entry: "CertificateEntry") -> str:
    """The line about a certificate that was just revoked."""
    return f"Revoked {entry.serial} of {_who(entry)}"


def table(entries: "Sequence[CertificateEntry]", now: datetime) -> str:
    """Render certificates as a table, one line for each."""
    rows = [("NAME", "ROLE", "STATE", "UNTIL", "SERIAL")]
    rows += [
        (
            visible(entry.name),
            visible(entry.role) or f"({entry.kind})",
            entry.state(now),
            f"{entry.not_after:%Y-%m-%d}",
            entry.serial,
        )
        for entry in entries
    ]
    sizes = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(size) for cell, size in zip(row, sizes, strict=False)), row[4]])
        for row in rows
    )


def details(entry: "CertificateEntry", now: datetime) -> str:
    """Render all of one certificate's entry, one line for each item."""
    lines = [
        ("Name", entry.name),
        ("Role", entry.role),
        ("Kind", entry.kind),
        ("Hosts", ", ".join(entry.hosts)),
        ("State", entry.state(now)),
        ("Valid from", entry.not_before.isoformat()),
        ("Valid until", entry.not_after.isoformat()),
        ("Serial", entry.serial),
        ("SHA-256", entry.fingerprint),
        ("Revoked at", entry.revoked_at.isoformat() if entry.revoked_at else ""),
        ("Reason", entry.reason or ""),
    ]
    return "\n".join(f"{label}: {visible(text)}" for label, text in lines if text)
