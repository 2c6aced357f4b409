"""Products with 2:4 weights on an NVIDIA GPU's sparse matrix units (Mishra et al. 2021, arXiv:2104.08378).

Of every four neighbours along the inputs at most two are not zero; those two and where they stand take 9/16 of the
dense bytes. torch packs and multiplies (cuSPARSELt, or CUTLASS where it lacks that); this module knows which weights it
takes.

Shapes: T rows, O output channels, I input channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ROW_MULTIPLE, COLUMN_MULTIPLE = 32, 64
"""CUTLASS's for 16-bit weights; cuSPARSELt takes smaller ones too."""
MIN_CAPABILITY = (8, 0)


def why_not(weight_OI: Tensor) -> str | None:
    """Why a 2:4 weight is multiplied as a dense one; None where it is not."""
    if weight_OI.dtype not in (torch.bfloat16, torch.float16):
        return f"no sparse product in {weight_OI.dtype}".replace("torch.", "")
    num_rows, num_columns = weight_OI.shape
    if num_rows % ROW_MULTIPLE or num_columns % COLUMN_MULTIPLE:
        return f"{num_rows} x {num_columns} is no multiple of {ROW_MULTIPLE} x {COLUMN_MULTIPLE}"
    if weight_OI.device.type != "cuda":
        return f"no sparse product on {weight_OI.device.type}"
    capability = torch.cuda.get_device_capability(weight_OI.device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability}, at least {MIN_CAPABILITY} is needed"
    return None


class SparseLinear:
    """See `linear.Linear`; for weights that `why_not` has nothing against."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight_OI = torch.sparse.to_sparse_semi_structured(weight_OI)
        self._bias_O = bias_O
        backend = str(getattr(self._weight_OI, "BACKEND", "semi-structured"))
        self.kernel = f"torch 2:4 {weight_OI.dtype} ({backend})".replace("torch.", "")

    def __call__(self, x_TI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.linear(x_TI, self._weight_OI, self._bias_O).to(dtype or x_TI.dtype)

    def tensors(self) -> list[Tensor]:
        held = (getattr(self._weight_OI, name) for name in ("packed", "meta"))
        return [tensor for tensor in (*held, self._bias_O) if tensor is not None]
