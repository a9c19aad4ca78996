"""What the service takes of its host: user ids, file descriptors, memory and disk."""
