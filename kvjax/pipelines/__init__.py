"""What the command line runs: each pipeline goes from a checkpoint to a result."""
