"""What both programs have of a command line: kinds of values, errors and exit codes, hints."""
