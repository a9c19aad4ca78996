"""Who may connect, what each may do, and the record of who did it."""
