"""Which implementation of the decoder's operations a model runs on, chosen once, by device, dtype and head size.

Products are `linear.py`'s; whole passes in one piece are `cpu_step.py`'s and `cuda_graphs.py`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engines.kernels.attention import Attention, PassFacts, TorchAttention
from engines.kernels.cpu_attention import LongAttention, long_attention_library
from engines.kernels.rms_norm import add_rms_norm, rms_norm
from engines.kernels.swiglu import swiglu


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """Attributes:
    kernels: the implementation of each operation, for `EngineInfo.kernels`.
    rms_norm, add_rms_norm, swiglu: as the functions of those names in plain torch.
    attention: prepares the attention of one pass.
    is_recordable: whether a pass over a cache never waits for the device, so that a CUDA graph can record it.
    """

    kernels: dict[str, str]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    attention: Callable[[PassFacts], Attention]
    is_recordable: bool = False


TORCH_OPS = Ops(
    kernels={"attention": "torch: SDPA over gathered blocks", "norms and SwiGLU": "torch"},
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    swiglu=swiglu,
    attention=TorchAttention,
)


def choose_ops(device: torch.device, dtype: torch.dtype, head_dim: int) -> Ops:
    """Triton's on an NVIDIA GPU, torch's with our own attention on a CPU, as far as they go; the names say why not."""
    if device.type == "cuda":
        return _gpu_ops(device, dtype, head_dim)
    if device.type != "cpu":
        return TORCH_OPS
    library = long_attention_library(dtype, head_dim)
    attention = TORCH_OPS.kernels["attention"]
    if isinstance(library, str):
        return _renamed({"attention": f"{attention}; not native: {library}"})
    kernels = {"attention": f"{library.description}, over blocks as they lie"}
    return replace(_renamed(kernels), attention=partial(LongAttention, library=library))


def _gpu_ops(device: torch.device, dtype: torch.dtype, head_dim: int) -> Ops:
    from engines.kernels.triton.support import why_not

    reason = why_not(device, dtype, head_dim)
    if reason is None:
        from engines.kernels.triton.ops import TRITON_OPS

        return TRITON_OPS
    return _renamed(
        {name: f"{kernel}; no Triton: {reason}" for name, kernel in TORCH_OPS.kernels.items()}
    )


def _renamed(kernels: dict[str, str]) -> Ops:
    """Torch's, some under another name."""
    return replace(TORCH_OPS, kernels={**TORCH_OPS.kernels, **kernels})
