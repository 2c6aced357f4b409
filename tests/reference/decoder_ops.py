"""The decoder's operations as their papers write them, in float64, with loops where a kernel has none."""

import math

import torch
from torch import Tensor


def attention(query_ND: Tensor, keys_CKD: Tensor, values_CKD: Tensor, window: int | None) -> Tensor:
    """One query at the last of C positions."""
    num_heads, head_dim = query_ND.shape
    group = num_heads // keys_CKD.shape[1]
    first = 0 if window is None else max(0, len(keys_CKD) - window)
    outputs = []
    for head in range(num_heads):
        keys_CD = keys_CKD[first:, head // group].double()
        values_CD = values_CKD[first:, head // group].double()
        scores_C = keys_CD @ query_ND[head].double() / math.sqrt(head_dim)
        outputs.append(torch.softmax(scores_C, dim=0) @ values_CD)
    return torch.stack(outputs)


def int8_rows(x_TI: Tensor) -> Tensor:
    """What a row is after symmetric INT8 quantization, a scale to 32 inputs: float64 (T, I)."""
    groups_TGI = x_TI.double().reshape(len(x_TI), -1, 32)
    scale_TG1 = groups_TGI.abs().amax(dim=2, keepdim=True) / 127
    codes_TGI = torch.where(scale_TG1 > 0, groups_TGI / scale_TG1, 0.0).round()
    return (codes_TGI * scale_TG1).flatten(1)
