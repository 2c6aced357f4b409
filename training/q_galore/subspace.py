"""The subspace of a matrix' gradient: its basis, how it is found, and the way there and back (GaLore, Zhao et al.
2024, arXiv:2403.03507).

The basis lies along the smaller side of the gradient: R = G P for a tall one ("right"), R = P^T G for a wide one
("left"). Everything below sees the tall form A of a gradient, G or G^T, whose best basis is its first right singular
vectors. What is found is compared by how much two subspaces overlap: singular vectors have arbitrary signs and turn
within their subspace, so the published test, the cosine of the two first vectors, takes a standing subspace for a
moving one.

Shapes: L the longer side, D the shorter, K the rank.
"""

import torch
from torch import Tensor

from training.q_galore.sizes import Side, side_of
from training.spec import Refresh, Similarity

OVERSAMPLING = 10
POWER_ITERATIONS = 2


def project(gradient: Tensor, basis_DK: Tensor, side: Side) -> Tensor:
    """The gradient's coordinates in the subspace: (L, K) or, left, (K, L)."""
    return gradient @ basis_DK if side == "right" else basis_DK.T @ gradient


def project_back(coordinates: Tensor, basis_DK: Tensor, side: Side) -> Tensor:
    """The matrix that has these coordinates."""
    return coordinates @ basis_DK.T if side == "right" else basis_DK @ coordinates


def find_basis(
    gradient: Tensor,
    rank: int,
    refresh: Refresh,
    *,
    old_DK: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """A basis of the gradient's dominant subspace, float32 (D, K) with orthonormal columns, strongest first.

    Args:
        gradient: finite and not zero.
        rank: at most D.
        old_DK: the basis so far, which "warm" starts from; without one it is "gram_eigh".
        generator: draws the directions that "randomized" starts from.
    """
    tall_LD = gradient.float() if side_of(tuple(gradient.shape)) == "right" else gradient.float().T
    # The basis does not depend on the gradient's size, but squares of small gradients would vanish.
    tall_LD = tall_LD / tall_LD.abs().max()
    if refresh == "svd":
        basis_KD: Tensor = torch.linalg.svd(tall_LD, full_matrices=False).Vh[:rank]
        return basis_KD.T.contiguous()
    if refresh == "randomized":
        size = (tall_LD.shape[1], min(rank + OVERSAMPLING, tall_LD.shape[1]))
        start = torch.randn(size, generator=generator, device=tall_LD.device)
        for _ in range(POWER_ITERATIONS):
            start = torch.linalg.qr(tall_LD.T @ (tall_LD @ start)).Q
        found_DK = start @ _strongest(tall_LD @ start, rank)
        return found_DK.contiguous()
    if refresh == "warm" and old_DK is not None:
        turned_DK: Tensor = torch.linalg.qr(tall_LD.T @ (tall_LD @ old_DK.float())).Q
        return turned_DK
    return _strongest(tall_LD, rank)


def _strongest(tall_LD: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the Gram matrix, which are right singular vectors, at a fraction of an SVD's cost."""
    vectors_DD: Tensor = torch.linalg.eigh(tall_LD.T @ tall_LD).eigenvectors
    return vectors_DD.flip(1)[:, :rank].contiguous()


def similarity(old_DK: Tensor, new_DK: Tensor, measure: Similarity) -> float:
    """How much a subspace stayed what it was: 1 for the same.

    "overlap" is |P_old^T P_new|^2 / K, less what two random subspaces share (K / D), as a part of the rest; so it is
    about 0 for unrelated ones whatever their rank. "signed_top1" is the cosine of the first vectors, as published.
    """
    old_DK, new_DK = old_DK.float(), new_DK.float()
    if measure == "signed_top1":
        return float(torch.nn.functional.cosine_similarity(old_DK[:, 0], new_DK[:, 0], dim=0))
    num_dimensions, rank = new_DK.shape
    if rank == num_dimensions:
        return 1.0
    by_chance = rank / num_dimensions
    shared = float((old_DK.T @ new_DK).square().sum()) / rank
    return (shared - by_chance) / (1 - by_chance)
