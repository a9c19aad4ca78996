"""Disks in files: those that jobs write to, and volumes, which outlive jobs."""
