"""The service's side of the launcher: starting it, sending requests, explaining refusals."""
