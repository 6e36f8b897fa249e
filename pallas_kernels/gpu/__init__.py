"""Mosaic GPU kernels for Hopper. Read operations, kernel, compute, scratch in this order."""
