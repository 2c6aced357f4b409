"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its tables.

Angles, sines and cosines are float32 and only the rotated heads are rounded to the model's dtype; transformers rounds
the sines too, which in bfloat16 costs accuracy at long positions. Scalings are transformers' own formulas: linear,
llama3 (arXiv:2407.21783), YaRN (arXiv:2309.00071). "dynamic" changes the angles only past `max_position_embeddings`,
which is as far as our tables go, so that up to there it is the default.

Shapes: T rows, A heads, D head dim, R = D / 2, P positions.
"""

from typing import Any

import torch
from torch import Tensor

SUPPORTED_SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def rotary_tables(config: Any, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos_PR and sin_PR, float32 on the CPU, for positions from 0.

    Args:
        config: a transformers configuration whose rope type is among `SUPPORTED_SCALINGS`.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = config.rope_parameters["rope_type"]
    scale = 1.0
    if rope_type in ("default", "dynamic"):
        exponents_R = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inverse_frequency_R = 1.0 / (config.rope_parameters["rope_theta"] ** exponents_R)
    else:
        inverse_frequency_R, scale = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    positions_P = torch.arange(num_positions, dtype=torch.float32)
    angles_PR = torch.outer(positions_P, inverse_frequency_R.float())
    return angles_PR.cos() * scale, angles_PR.sin() * scale


def rotate(heads_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turn each head's pairs (i, i + R) by the row's angles. The result has the dtype of the heads."""
    first_TAR, second_TAR = heads_TAD.chunk(2, dim=-1)
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    rotated_TAD = torch.cat(
        [
            first_TAR * cos_T1R - second_TAR * sin_T1R,
            second_TAR * cos_T1R + first_TAR * sin_T1R,
        ],
        dim=-1,
    )
    return rotated_TAD.to(heads_TAD.dtype)
