"""The client side of the wire: dialling a server and the public asynchronous API."""
