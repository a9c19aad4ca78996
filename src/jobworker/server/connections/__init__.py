"""Connections: the port, the HTTP request that opens a WebSocket, and the frames that are sent."""
