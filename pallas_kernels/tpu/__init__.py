"""Mosaic kernels for TPUs, one operation a file."""
