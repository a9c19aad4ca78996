"""What a job is, which states it passes through and who may touch it: pure data, no I/O."""
