"""What the command line runs: each function goes from a checkpoint to a result."""
