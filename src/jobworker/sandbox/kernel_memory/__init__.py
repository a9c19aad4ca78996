"""Kernel memory that jobs hold and no control group counts, found by looking at jobs."""
