"""The launcher, the one process with root's rights, and all that it alone runs."""
