"""The table of subjects: roles for certificates that another authority has issued. Pure.

`worker certs` writes a role into a certificate's only OU. The certificates of a company's authority
have other contents: several OUs, host names, URIs such as SPIFFE ids. So a table of the
configuration maps such values to roles. Entries are compared exactly. Patterns were rejected: they
would grant a role to certificates that nobody has reviewed.

    uri:spiffe://corp.example/ci  →  tenant          cn:alice  →  admin
"""

import re
from collections.abc import Collection, Mapping

from attrs import field, frozen

from jobworker.errors import PermissionDenied

KINDS = ("cn", "ou", "dns", "uri", "email")
"""The kinds of entries: `cn` and `ou` of the subject, the rest of the subject alternative name."""

_ENTRY = re.compile(rf"({'|'.join(KINDS)}):(\S|\S.*\S)")


@frozen
class Match:
    """The entry that matches a certificate."""

    role: str
    value: str
    """The value in the certificate that matched, without its kind."""


@frozen
class Subjects:
    """The table: entries such as `dns:build1.example.org`, each with a role."""

    _roles: Mapping[str, str] = field(factory=dict)
    roles_from_ou: bool = True
    """Whether the only OU is the role of a certificate that no entry matches."""

    def find(self, borne: Mapping[str, Collection[str]]) -> Match | None:
        """Return the match for a certificate with the values `borne`, by kind; None for no match.

        Raises PermissionDenied if the matching entries have different roles: the choice would be
        arbitrary.
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
                remedy="ask the administrator to correct security.subjects",
            )
        return matches[0] if matches else None


def entry_fault(entry: str) -> str | None:
    """Return why a key of the table is invalid; None if it is valid."""
    if _ENTRY.fullmatch(entry) and entry.isprintable():
        return None
    kinds = ", ".join(f"{kind}:" for kind in KINDS)
    return f"{entry!r} does not begin with one of {kinds} or has no value after it"
