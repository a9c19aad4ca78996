"""The probes of `worker check`: what it tries on this host, and how."""
