"""Find out whether a revocation list covers all certificates of its CA: RFC 5280, section 5.2.

Two libraries apply a list. The TLS context uses the OpenSSL of Python, and the check of connected
clients that of `cryptography`. They agree about complete lists only: some versions of OpenSSL take
a delta list for a complete one, so that all certificates that are revoked in the complete list are
valid again. With a list that is only for some certificates, or has a critical extension that
OpenSSL does not know, no client can connect. So such lists are refused before their use.

A list of a distribution point is accepted. OpenSSL applies it to the certificates that name this
point, and refuses all others.
"""

from cryptography import x509

_KNOWN_TO_OPENSSL = (x509.IssuingDistributionPoint, x509.AuthorityKeyIdentifier)
"""The extensions that may be critical; crl_cb in crypto/x509/x_crl.c of OpenSSL."""
_TRUE = b"\1\1\xff"
"""BOOLEAN TRUE in DER, as in each extension that is critical."""


def scope_fault(found: x509.CertificateRevocationList) -> str | None:
    """Return why a list cannot be used, in words; None for a complete one."""
    for each in found.extensions:
        if isinstance(each.value, x509.DeltaCRLIndicator):
            return "it is a delta list, which has only the changes since a complete one"
        if isinstance(each.value, x509.IssuingDistributionPoint) and (only := _only(each.value)):
            return f"it is not for all certificates of its CA ({only})"
        if each.critical and not isinstance(each.value, _KNOWN_TO_OPENSSL):
            return f"OpenSSL does not know its critical extension {each.oid.dotted_string}"
    # An entry's extensions take 10 us to read, so they are read only if one may be critical.
    if _TRUE in found.tbs_certlist_bytes:
        for entry in found:
            for each in entry.extensions:
                if each.critical:
                    oid = each.oid.dotted_string
                    return f"OpenSSL does not know the critical extension {oid} of an entry"
    return None


def _only(point: x509.IssuingDistributionPoint) -> str:
    """What a list is only for, by the names of RFC 5280; "" if it is for all certificates."""
    limits = {
        "onlyContainsUserCerts": point.only_contains_user_certs,
        "onlyContainsCACerts": point.only_contains_ca_certs,
        "onlyContainsAttributeCerts": point.only_contains_attribute_certs,
        "onlySomeReasons": point.only_some_reasons is not None,
        "indirectCRL": point.indirect_crl,
    }
    return ", ".join(name for name, limited in limits.items() if limited)


def distribution_point(found: x509.CertificateRevocationList) -> str | None:
    """Return the names of the distribution point of a list; None if it has none."""
    for each in found.extensions:
        point = each.value
        if isinstance(point, x509.IssuingDistributionPoint):
            if point.full_name is not None:
                return ", ".join(str(name.value) for name in point.full_name)
            if point.relative_name is not None:
                return point.relative_name.rfc4514_string()
    return None
