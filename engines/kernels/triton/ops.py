"""The Triton kernels under the names that the decoder calls; `engines/kernels/ops.py` chooses them."""

from engines.kernels.ops import Ops
from engines.kernels.triton.paged_attention import TritonAttention
from engines.kernels.triton.rms_norm import add_rms_norm, rms_norm
from engines.kernels.triton.swiglu import swiglu

TRITON_OPS = Ops(
    kernels={
        "attention": "triton: paged, split over the context in decode",
        "norms and SwiGLU": "triton",
    },
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    swiglu=swiglu,
    attention=TritonAttention,
    is_recordable=True,
)
