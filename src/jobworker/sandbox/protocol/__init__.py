"""The protocol between service and launcher: a table of operations, events, the policy."""
