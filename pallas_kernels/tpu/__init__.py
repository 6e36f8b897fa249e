"""Mosaic kernels for TPUs. Read operations, then kernel; limits has the sizes of a piece."""
