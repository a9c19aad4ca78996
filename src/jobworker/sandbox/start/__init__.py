"""The start of a job: the plan, its steps, and the code by which a process applies them."""
