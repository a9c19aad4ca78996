"""Run other people's commands on a Linux host without giving those people the host."""

__version__ = "0.1.0"
