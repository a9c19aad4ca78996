"""Kernel memory that jobs hold and no control group counts: how it is measured and searched."""
