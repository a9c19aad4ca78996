"""File systems in image files: the disk that a job writes to, and volumes, which outlive jobs."""
