"""The start of the service and of a launcher that runs on its own, and the reload."""
