"""The data of jobs: their requests, records and states, and the roles of clients. Pure, no I/O."""
