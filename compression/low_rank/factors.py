"""Factors of a weight by truncated SVD, with or without regard to its inputs.

Plain: W ~ P (P^T W) with P the left singular vectors of the largest singular values (the best of its rank, Eckart and
Young 1936). With inputs X whose Gram matrix is G = X^T X, the error that counts is |X (W - W')^T|; its best
W' is again P (P^T W), with P the left singular vectors of W G^(1/2). SVD-LLM (Wang et al. 2024, arXiv:2403.07378) gets
the same matrix through a Cholesky factor of G and its inverse; neither is needed here, so a singular G does no harm.
The singular values are split evenly between the factors, as WeLore does (Jaiswal et al. 2024, arXiv:2407.11239).

Eigenvectors of the smaller Gram matrix in float64 take the place of an SVD: several times faster, and singular values
are exact to about 1e-8 of the largest.

Shapes: O output channels, I input channels, R = min(O, I), K kept rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """Attributes:
    singular_values_R: descending, float64.
    basis_OR: left singular vectors as columns, float64.
    """

    singular_values_R: Tensor
    basis_OR: Tensor


def singular_values(weight_OI: Tensor, gram_II: Tensor | None = None) -> Tensor:
    """Those of `spectrum` alone, in a third of the time: float64 (R,), descending.

    Raises:
        ValueError: a weight or the Gram matrix is not finite.
    """
    return _roots(torch.linalg.eigvalsh(_smaller_product(*_scaled(weight_OI, gram_II))))


def spectrum(weight_OI: Tensor, gram_II: Tensor | None = None) -> Spectrum:
    """Singular values and left singular vectors of W, or of W G^(1/2).

    Raises:
        ValueError: a weight or the Gram matrix is not finite.
    """
    left_OI, right_OI = _scaled(weight_OI, gram_II)
    values_R, vectors_RR = torch.linalg.eigh(_smaller_product(left_OI, right_OI))
    basis_OR = vectors_RR.flip(1)
    if left_OI.shape[0] > left_OI.shape[1]:
        # QR instead of a division by singular values that may be zero: the same columns, orthonormal whatever they are
        basis_OR, triangle_RR = torch.linalg.qr(left_OI @ basis_OR)
        signs_R = triangle_RR.diagonal().sign()
        basis_OR = basis_OR * torch.where(signs_R == 0, torch.ones_like(signs_R), signs_R)
    return Spectrum(singular_values_R=_roots(values_R), basis_OR=basis_OR)


def _scaled(weight_OI: Tensor, gram_II: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two float64 matrices A, B with A B^T = W G W^T where W is wide, and A = B = W G^(1/2) where it is tall."""
    weight_OI = weight_OI.double()
    for name, tensor in (("weight", weight_OI), ("Gram matrix", gram_II)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")
    if gram_II is None:
        return weight_OI, weight_OI
    if weight_OI.shape[0] <= weight_OI.shape[1]:
        return weight_OI @ gram_II.double(), weight_OI
    scaled_OI = weight_OI @ _root(gram_II.double())
    return scaled_OI, scaled_OI


def _smaller_product(left_OI: Tensor, right_OI: Tensor) -> Tensor:
    wide = left_OI.shape[0] <= left_OI.shape[1]
    return left_OI @ right_OI.T if wide else left_OI.T @ right_OI


def _roots(eigenvalues_R: Tensor) -> Tensor:
    return eigenvalues_R.clamp(min=0).sqrt().flip(0)


def factor(weight_OI: Tensor, basis_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of a rank: float32 (O, K) and (K, I).

    Raises:
        ValueError: no such rank.
    """
    if not 1 <= rank <= basis_OR.shape[1]:
        raise ValueError(f"rank must be in [1, {basis_OR.shape[1]}], got {rank}")
    basis_OK = basis_OR[:, :rank]
    rows_KI = basis_OK.T @ weight_OI.double()
    split_K = rows_KI.norm(dim=1).sqrt()
    split_K = torch.where(split_K > 0, split_K, torch.ones_like(split_K))
    return (basis_OK * split_K).float(), (rows_KI / split_K[:, None]).float()


def break_even_rank(out_features: int, in_features: int) -> float:
    """Below it two factors hold fewer numbers than the matrix."""
    return out_features * in_features / (out_features + in_features)


def _root(gram_II: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values_I, vectors_II = torch.linalg.eigh(gram_II)
    root_II: Tensor = vectors_II * values_I.clamp(min=0).sqrt() @ vectors_II.T
    return root_II
