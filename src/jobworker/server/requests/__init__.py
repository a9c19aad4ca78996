"""What clients ask for: conversations, and what each method of the protocol does."""
