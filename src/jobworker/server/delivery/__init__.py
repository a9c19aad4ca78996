"""What goes out to clients: subscriptions to output, and jobs' records as JSON."""
