"""How a process becomes a job: the plan, its steps, and the code that carries them out."""
