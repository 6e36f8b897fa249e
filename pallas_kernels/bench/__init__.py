"""Speed of the decode operations: `python -m pallas_kernels.bench`."""
