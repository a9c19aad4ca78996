"""The configuration: settings, their defaults, and their bounds."""
