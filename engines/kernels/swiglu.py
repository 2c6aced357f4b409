"""SwiGLU's gate (Shazeer 2020, arXiv:2002.05202).

Shapes: T rows, F feed-forward width.
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def swiglu(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up, of the two halves (T, 2 F) of the fused product."""
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
