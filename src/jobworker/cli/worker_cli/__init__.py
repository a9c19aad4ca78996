"""`worker-cli`: the client's commands, its options, and what it prints."""
