"""Where the Triton kernels run: on which devices and models, and what differs in the interpreter.

Triton (Tillet et al. 2019) compiles a kernel for the GPU at its first launch. With `TRITON_INTERPRET=1`, set before
Triton is imported, the same kernels run on CPU tensors in NumPy, which is how they are tested where there is no GPU.
"""

import importlib.util
import os
import shutil

import torch

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 256
INT4_GROUP_SIZES = (32, 64, 128)
"""The next, 256, would need more shared memory than some cards have."""
MIN_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 in its matrix units."""


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a model's passes cannot run on these kernels; None where they can."""
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim}, even and at most {MAX_HEAD_DIM} is taken"
    return _why_not_here(device, dtype)


def why_no_int4(device: torch.device, dtype: torch.dtype, group_size: int) -> str | None:
    """The same of an INT4 product."""
    if group_size not in INT4_GROUP_SIZES:
        return f"group_size {group_size}, taken are {INT4_GROUP_SIZES}"
    return _why_not_here(device, dtype)


def _why_not_here(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"no kernels in {dtype}".replace("torch.", "")
    if device.type != "cuda":
        return f"no kernels for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang")):
        return "no C compiler (gcc or clang), which Triton launches its kernels with"
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability}, at least {MIN_CAPABILITY} is needed"
    return None
