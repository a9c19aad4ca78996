"""Certificates: the authority that issues them and the TLS contexts that check them."""
