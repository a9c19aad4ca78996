"""What service and launcher say to one another: a table of operations, events, the policy."""
