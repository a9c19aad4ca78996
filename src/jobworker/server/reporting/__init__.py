"""What the service says about itself: its log, counters, and messages to the service manager."""
