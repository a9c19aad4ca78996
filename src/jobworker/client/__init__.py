"""The client's side: dial an address, keep the connection, make calls and follow output."""
