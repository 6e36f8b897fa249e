"""A full disk for the tests."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(file_bytes):
    """No file grows beyond this size; the system then reports an error, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
