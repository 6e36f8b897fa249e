"""The tasks, one module each: `load(options) -> Task`."""
