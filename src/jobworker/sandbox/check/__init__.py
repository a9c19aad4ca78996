"""What `worker check` tries on this host."""
