"""Memory of an engine process: how much a cache may take, and giving back what was freed."""

import gc
import os

import torch

from compression.memory import trim_heap

DEFAULT_KV_CACHE_BYTES = 2 * 2**30


def default_kv_cache_bytes(device: torch.device) -> int:
    """2 GiB, or less where a quarter of the memory is less; on a GPU half of what is free beside the weights."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(DEFAULT_KV_CACHE_BYTES, total // 4)


def is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in str(error)  # torch's CPU allocator
    )


def release_memory() -> None:
    """Give freed pages back to the system, not only to the allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()
