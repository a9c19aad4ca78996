"""The client's side: an address dialled, a connection kept, calls made and output followed."""
