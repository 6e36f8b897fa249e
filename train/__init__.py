"""Training applications, run from a checkout: `python -m train --help`."""
