"""The networks of jobs, as the launcher makes them: modes, and the gateway of a private network."""
