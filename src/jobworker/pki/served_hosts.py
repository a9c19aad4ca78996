"""The hosts in a server's certificate, to which a browser may have connected.

In an attack by DNS rebinding, a page's own name resolves to the server's address, and the browser
sends this name as `Host`. TLS refuses the name, unless the user clicks the warning away. So the
server compares `Host` with its certificate again.
"""

from attrs import frozen


@frozen
class ServedHosts:
    """Names and addresses of one certificate, in lower case."""

    _names: frozenset[str]

    @classmethod
    def of(cls, pem: bytes) -> "ServedHosts":
        """Read the hosts of the first certificate in `pem` (RFC 5280, section 4.2.1.6)."""
        from cryptography import x509

        leaf = x509.load_pem_x509_certificates(pem)[0]
        try:
            found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return cls(frozenset())
        names = {name.lower() for name in found.get_values_for_type(x509.DNSName)}
        addresses = {str(address) for address in found.get_values_for_type(x509.IPAddress)}
        return cls(frozenset(names | addresses))

    def hold(self, host: str) -> bool:
        """Whether a `Host` header, with or without a port, names one of the hosts."""
        name, bracket, _ = host.lower().partition("]")
        name = name.removeprefix("[") if bracket else name.partition(":")[0]
        # A wildcard stands for the first label alone (RFC 6125, section 6.4.3).
        return name in self._names or f"*.{name.partition('.')[2]}" in self._names
