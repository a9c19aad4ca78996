"""A job's output: from its pipes to files, and from the files to followers."""
