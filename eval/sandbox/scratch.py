"""Folders in which answers may write, and their removal, whatever is in them."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def scratch_folders(count: int) -> Iterator[list[tuple[str, str]]]:
    """Empty folders for `count` programs, two for each: the answer's and the test's."""
    parent = os.path.realpath(tempfile.mkdtemp(prefix="kvjax-run-"))
    try:
        # Another uid must be able to reach its folder, but not to list those of others.
        os.chmod(parent, 0o711)
        pairs = [(f"{parent}/{n}-answer", f"{parent}/{n}-test") for n in range(count)]
        for path in itertools.chain(*pairs):
            os.mkdir(path, 0o700)
        yield pairs
    finally:
        # What cannot be removed stays: it is no reason to lose the results.
        with suppress(OSError):
            remove(parent)


def remove(top: str) -> None:
    """Removes a folder with all that is in it, however deep, and though folders are locked.

    Without recursion and without long paths: a folder's folders move up to `top` before it goes.

    Raises:
        OSError: something cannot be removed.
    """
    # Nothing in the folder has a name with this beginning.
    start, numbers = os.urandom(16).hex(), itertools.count()
    while entries := list(os.scandir(top)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                os.rename(inner.path, f"{top}/{start}{next(numbers)}")
            os.rmdir(entry.path)
    os.rmdir(top)
