"""The service: listener, connections and the operations that they may call."""
