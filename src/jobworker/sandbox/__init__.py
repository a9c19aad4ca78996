"""The sandbox of jobs: plan, launcher, namespaces, root, network, control groups."""
