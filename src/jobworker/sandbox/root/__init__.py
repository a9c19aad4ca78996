"""The root that jobs see, and the mount namespace in which it is put together."""
