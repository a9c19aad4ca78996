"""The service's side of the launcher: start it, ask it, put its refusals into words."""
