"""Roles by what a certificate bears, for certificates that are not made for this service. Pure.

`worker certs` writes a role into a certificate's one OU. A company's own authority writes what it
always writes: several OUs, host names, URIs such as SPIFFE ids. So a table of the configuration
says which of these has which role. Entries are compared exactly, character by character; there are
no patterns, since a pattern grants what nobody has looked at.

    uri:spiffe://corp.example/ci  →  tenant          cn:alice  →  admin
"""

import re
from collections.abc import Collection, Mapping

from attrs import field, frozen

from jobworker.errors import PermissionDenied

KINDS = ("cn", "ou", "dns", "uri", "email")
"""What an entry can name: of the subject CN and OU, of the subject alternative name the rest."""

_ENTRY = re.compile(rf"({'|'.join(KINDS)}):(\S|\S.*\S)")


@frozen
class Match:
    """What the table says of a certificate."""

    role: str
    value: str
    """That by which it was found, without its kind."""


@frozen
class Subjects:
    """The table: entries such as `dns:build1.example.org`, each with a role."""

    _roles: Mapping[str, str] = field(factory=dict)
    roles_from_ou: bool = True
    """Whether a certificate that no entry names has its one OU for its role."""

    def find(self, borne: Mapping[str, Collection[str]]) -> Match | None:
        """What the table says of a certificate that bears these values, by kind; None is nothing.

        Raises PermissionDenied where its entries have different roles: none of them is chosen.
        """
        matches = [
            Match(role, entry.partition(":")[2])
            for entry, role in self._roles.items()
            if entry.partition(":")[2] in borne.get(entry.partition(":")[0], ())
        ]
        roles = sorted({match.role for match in matches})
        if len(roles) > 1:
            raise PermissionDenied(
                "cannot take a role from your certificate: the server's table gives it "
                + " and ".join(roles),
                remedy="ask the administrator to mend security.subjects",
            )
        return matches[0] if matches else None


def entry_fault(entry: str) -> str | None:
    """Say why a key of the table names nothing; None if it is good."""
    if _ENTRY.fullmatch(entry) and entry.isprintable():
        return None
    kinds = ", ".join(f"{kind}:" for kind in KINDS)
    return f"{entry!r} begins with none of {kinds} or names nothing after it"
