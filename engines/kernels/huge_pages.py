"""Memory for weights and caches in huge pages: reading them then costs few page walks.

A walk is dear in a virtual machine: there huge pages raised one core's bandwidth from 12 to 16-20 GB/s
(benchmarks/results). Weights are smaller than a huge page is wasteful, so they share regions; a region lives
as long as any of its tensors. Systems without `madvise` have ordinary pages.
"""

import ctypes
import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2**21
REGION_BYTES = 16 * HUGE_PAGE
ALIGNMENT = 64


class _Regions:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """uint8, aligned to cache lines, zeros."""
        with self._lock:
            size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
            if size > len(self._free):
                self._free = map_memory(max(REGION_BYTES, -(-size // HUGE_PAGE) * HUGE_PAGE))
            taken, self._free = self._free[:num_bytes], self._free[size:]
            return taken


def map_memory(num_bytes: int) -> Tensor:
    """uint8 zeros, not resident until they are written."""
    # One page more than asked for, to start at a multiple. Private: shared memory has no huge pages.
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    whole = torch.frombuffer(region, dtype=torch.uint8)  # keeps the mapping
    start = -address % HUGE_PAGE
    return whole[start : start + num_bytes]


_regions = _Regions()


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy of a CPU tensor."""
    if tensor.numel() == 0:
        return tensor.clone()
    memory = _regions.take(tensor.numel() * tensor.element_size())
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
