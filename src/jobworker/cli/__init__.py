"""The command lines `worker-cli` and `worker`."""
