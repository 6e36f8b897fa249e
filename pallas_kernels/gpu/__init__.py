"""Mosaic GPU kernels for Hopper, one operation a file."""
