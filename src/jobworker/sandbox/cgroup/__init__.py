"""The control groups of jobs, over cgroup v2, v1 and hybrid hosts."""
