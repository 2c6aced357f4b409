"""What every child process of Lathe does first, whatever it runs."""

import ctypes
import os
import signal
from collections.abc import MutableMapping

_PR_SET_PDEATHSIG = 1

# Read when torch is loaded: set before, or for a child.
TORCH_ENVIRONMENT = {
    # One idle OpenMP thread that spins makes every other process on a small machine several times slower, so threads
    # that wait must sleep.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "2000",
    # oneDNN makes a kernel of half a megabyte for each number of rows that a bfloat16 product has had. Torch and oneDNN
    # would each keep 1,024 of them: 0.6 GiB of a host that has read prompts of all lengths. Making one takes a ms.
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}


def set_torch_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Keep what the operator set; call before torch is imported."""
    environment = os.environ if environment is None else environment
    for name, value in TORCH_ENVIRONMENT.items():
        environment.setdefault(name, value)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends (Linux; elsewhere a no-op)."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() == 1 and os.environ.get("LATHE_PARENT_PID", "1") != "1":
        os._exit(1)  # the parent ended before prctl could watch it
