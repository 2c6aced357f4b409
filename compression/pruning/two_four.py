"""2:4 sparsity on disk: two values of every four inputs and a bit for each that stands, as compressed-tensors'
`sparse-24-bitmask` lays them out.

Half of the values and one bit to each weight: 9/16 of a 16-bit matrix.

Shapes: O output channels, I input channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def is_two_four(weight_OI: Tensor) -> bool:
    """Whether at most two of every four neighbours along the inputs are not zero."""
    if weight_OI.shape[1] % 4:
        return False
    return bool(((weight_OI.view(-1, 4) != 0).sum(dim=1) <= 2).all())


def to_tensors(weight_OI: Tensor) -> dict[str, Tensor]:
    """Tensors of a `TwoFourLinear`, by suffix.

    Raises:
        ValueError: more than two of four neighbours are not zero.
    """
    if not is_two_four(weight_OI):
        raise ValueError(f"a weight of shape {tuple(weight_OI.shape)} is not 2:4 sparse")
    # Always two of four, so that values have places: zeros fill up where fewer stand.
    order = (weight_OI.view(-1, 4) == 0).to(torch.int8).argsort(dim=1, stable=True)
    mask_OI = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :2], True)
    mask_OI = mask_OI.view(weight_OI.shape)
    num_rows, num_columns = weight_OI.shape
    bits_OB8 = F.pad(mask_OI, (0, -num_columns % 8)).view(num_rows, -1, 8).to(torch.uint8)
    return {
        "compressed": weight_OI[mask_OI].view(num_rows, num_columns // 2),
        "bitmask": (bits_OB8 << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8),
        "shape": torch.tensor(weight_OI.shape, dtype=torch.int64),
    }


def from_tensors(tensors: dict[str, Tensor]) -> Tensor:
    """Undo `to_tensors`: the weight (O, I).

    Raises:
        ValueError: the mask has not as many ones as there are values.
    """
    num_rows, num_columns = tensors["shape"].tolist()
    bits_OB8 = (tensors["bitmask"][..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    mask_OI = bits_OB8.flatten(1)[:, :num_columns].bool()
    values_OV = tensors["compressed"]
    if not (mask_OI.sum(dim=1) == values_OV.shape[1]).all():
        raise ValueError("the bitmask of a 2:4 weight does not say where its values stand")
    weight_OI = torch.zeros(num_rows, num_columns, dtype=values_OV.dtype)
    weight_OI[mask_OI] = values_OV.flatten()
    return weight_OI
