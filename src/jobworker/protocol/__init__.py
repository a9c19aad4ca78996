"""The wire protocol, sans-IO: messages in, events and messages out; no clock, no socket."""
