"""The root directory of jobs, and the launcher's mount namespace in which it is assembled."""
