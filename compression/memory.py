"""Giving freed memory back to the system."""

import ctypes


def trim_heap() -> None:
    """glibc keeps tensors of a few MB in its heap, which grows from block to block as they fragment it (by half of
    the model in the end). Other C libraries have nothing to ask."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
