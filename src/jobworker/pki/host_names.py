"""Convert host names and addresses to the form that a server's certificate contains."""

import ipaddress
import re
import unicodedata

from cryptography import x509

from jobworker import errors

_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)", re.ASCII)  # RFC 1123, section 2.1


def general_name(host: str) -> x509.DNSName | x509.IPAddress:
    """Convert an IP literal or a host name to a certificate's name, in lower case and IDNA.

    The encoding is IDNA 2003 (RFC 3490), which Python's ssl module uses for the name that it
    checks. Names that it would change into others (straße.de into strasse.de) are refused, and
    wildcards too. Raises `InvalidParams`.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return x509.DNSName(_dns_name(host))
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise _bad_host(host, "a certificate cannot contain the zone of an address")
    return x509.IPAddress(address)


def _dns_name(host: str) -> str:
    name = unicodedata.normalize("NFC", host.lower())
    if "*" in name:
        raise _bad_host(host, "wildcards are not issued; name each host")
    if len(name) > 253:  # RFC 1035, section 2.3.4; bounds the codec below too
        raise _bad_host(host[:60] + "…", "a host name has at most 253 characters")
    try:
        encoded = name.encode("idna").decode("ascii").lower()
        same = name.isascii() or encoded.encode("ascii").decode("idna") == name
    except UnicodeError as exc:
        raise _bad_host(host, f"it is not a host name ({exc})") from None
    if not same:
        raise _bad_host(host, f"IDNA turns it into another name, {encoded}")
    labels = encoded.split(".")
    if len(encoded) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _bad_host(host, "a host name has letters, digits and hyphens, separated by dots")
    if labels[-1].isdecimal():
        raise _bad_host(host, "it looks like an IP address, but is not valid as one")
    return encoded


def _bad_host(host: str, why: str) -> errors.InvalidParams:
    remedy = "give a name such as 'worker1.example.org', or an address without port or brackets"
    return errors.InvalidParams(f"cannot use the host {host!r}: {why}", remedy=remedy)
