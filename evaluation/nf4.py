"""NF4 for comparison: what bitsandbytes' 4-bit NormalFloat does to a model (Dettmers et al. 2023, arXiv:2305.14314).

Lathe neither stores nor serves it. bitsandbytes is optional (extra: nf4).
"""

import importlib.util
from typing import Any

import torch
from torch import nn

BLOCK_SIZE = 64
"""Weights that share a scale, in row-major order: QLoRA's."""


class Nf4UnavailableError(Exception):
    """bitsandbytes is not installed."""


@torch.no_grad()
def apply_nf4(model: Any) -> int:
    """Round every linear weight of the decoder blocks to NF4 in place, in its own dtype.

    Returns:
        Bytes that these weights take in NF4: half a byte each, and a float32 scale to `BLOCK_SIZE` of them, which
        QLoRA's second quantization would make smaller.

    Raises:
        Nf4UnavailableError
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Nf4UnavailableError("NF4 needs bitsandbytes: pip install 'lathe[nf4]'")
    from bitsandbytes import functional

    num_bytes = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            codes, state = functional.quantize_4bit(
                module.weight.data, blocksize=BLOCK_SIZE, quant_type="nf4"
            )
            module.weight.data = functional.dequantize_4bit(codes, state).to(module.weight.dtype)
            num_bytes += codes.nbytes + state.absmax.nbytes
    return num_bytes
