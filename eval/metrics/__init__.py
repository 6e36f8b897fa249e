"""Scores of an answer against one reference, 0 to 1: what the long-context benchmarks use."""
