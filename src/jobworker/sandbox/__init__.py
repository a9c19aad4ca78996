"""What stands between a job and the host: plan, launcher, namespaces, root, control groups."""
