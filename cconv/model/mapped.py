"""Mapped: a file whose bytes are read where they lie.

In: a path.  Out: its mapping, which lives as long as arrays are made of it.
"""

import mmap
import os


def mapped(path: str | os.PathLike) -> mmap.mmap:
    """The file's bytes, read-only; OSError where it cannot be read, ValueError where it is empty."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def forget(file: mmap.mmap) -> None:
    """The pages of the file that packing has read need not stay in memory."""
    if hasattr(file, "madvise"):
        file.madvise(mmap.MADV_DONTNEED)
