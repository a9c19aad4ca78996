"""`worker`: the service's start and its administration."""
