"""A sandbox for programs that a model wrote; `runner` is its entry."""
