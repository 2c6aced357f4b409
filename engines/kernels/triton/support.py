"""Where the Triton kernels run: on which devices and models, and what differs in the interpreter.

Triton (Tillet et al. 2019) compiles a kernel for the GPU at its first launch. With `TRITON_INTERPRET=1`, set before
Triton is imported, the same kernels run on CPU tensors in NumPy, which is how they are tested where there is no GPU.
"""

import importlib.util

import torch

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 in its matrix units."""


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a model cannot run on these kernels; None where it can."""
    if dtype not in DTYPES:
        return f"no kernels for {dtype}"
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim}, even and at most {MAX_HEAD_DIM} is taken"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability}, at least {MIN_CAPABILITY} is needed"
    return None
