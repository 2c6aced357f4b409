"""Bases of gradients' subspaces, and when they are found anew."""

import itertools

import pytest
import torch
from torch import Tensor

from training.q_galore.group_codes import dequantize, quantize
from training.q_galore.schedule import RefreshSchedule, fixed_refreshes
from training.q_galore.sizes import coordinate_shape, side_of
from training.q_galore.subspace import (
    find_basis,
    project,
    project_back,
    similarity,
)
from training.spec import Refresh

SHAPES = [(48, 32), (32, 48), (40, 40), (7, 5), (1, 9), (9, 1)]


def decaying(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    d = min(shape)
    u = torch.linalg.qr(torch.randn(shape[0], d, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(shape[1], d, generator=generator)).Q
    gradient: Tensor = 1e-6 * (u * 0.8 ** torch.arange(d)) @ v.T
    return gradient


def basis_of(
    gradient: Tensor, rank: int, refresh: Refresh = "svd", old: Tensor | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return find_basis(gradient, rank, refresh, old_DK=old, generator=generator)


def energy(gradient: Tensor, basis: Tensor) -> float:
    side = side_of(tuple(gradient.shape))
    return float(project(gradient, basis, side).norm() / gradient.norm()) ** 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("refresh", "share"), [("svd", 1.0), ("gram_eigh", 0.999), ("randomized", 0.99)]
)
def test_a_basis_is_orthonormal_and_holds_what_an_svd_would(
    shape: tuple[int, int], refresh: Refresh, share: float
) -> None:
    gradient, rank = decaying(shape), min(4, *shape)
    basis = basis_of(gradient, rank, refresh)
    assert basis.shape == (min(shape), rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)
    singular_values = torch.linalg.svdvals(gradient.double())
    best = float(singular_values[:rank].square().sum() / singular_values.square().sum())
    assert energy(gradient, basis) >= share * best - 1e-5
    side = side_of(shape)
    assert project(gradient, basis, side).shape == coordinate_shape(shape, rank)
    assert project_back(project(gradient, basis, side), basis, side).shape == shape


def test_a_warm_basis_turns_towards_the_gradient() -> None:
    old, new = decaying((48, 32), seed=0), decaying((48, 32), seed=1)
    stale = basis_of(old, 6)
    warm = basis_of(new, 6, "warm", stale)
    torch.testing.assert_close(warm.T @ warm, torch.eye(6), atol=1e-5, rtol=0)
    assert energy(new, stale) < 0.4
    assert energy(new, warm) > energy(new, stale) + 0.3
    assert torch.equal(basis_of(new, 6, "warm"), basis_of(new, 6, "gram_eigh"))


def test_full_rank_loses_nothing() -> None:
    gradient = decaying((48, 32))
    basis = basis_of(gradient, 32)
    restored = project_back(project(gradient, basis, "right"), basis, "right")
    torch.testing.assert_close(restored, gradient, atol=1e-11, rtol=1e-4)


def test_a_packed_basis_keeps_most_of_its_energy() -> None:
    """10.9 % error at groups of 256 is what the paper's quantizer has on orthonormal columns."""
    basis = basis_of(torch.randn(300, 256, generator=torch.Generator().manual_seed(0)), 64)
    error = float((dequantize(quantize(basis, 4)) - basis).norm() / basis.norm())
    assert 0.05 < error < 0.12


def test_overlap_sees_neither_signs_nor_rotation() -> None:
    basis = basis_of(decaying((48, 32)), 6)
    signs = torch.tensor([-1.0, 1, -1, -1, 1, -1])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    for same in (basis * signs, basis @ turn):
        assert similarity(basis, same, "overlap") == pytest.approx(1, abs=1e-5)
    assert similarity(basis, basis * signs, "signed_top1") == pytest.approx(-1, abs=1e-5)


def test_unrelated_subspaces_overlap_by_nothing_on_average() -> None:
    for rank in (2, 16, 28):
        found = []
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            one, two = (
                torch.linalg.qr(torch.randn(32, rank, generator=generator)).Q for _ in range(2)
            )
            found.append(similarity(one, two, "overlap"))
        assert abs(sum(found) / 20) < 0.05
    whole = torch.eye(8)
    assert similarity(whole, whole.flip(0), "overlap") == 1


def run_schedule(similarities: list[float], interval: int = 10, **options: object) -> list[int]:
    """Steps of the refreshes when these similarities are found."""
    schedule = RefreshSchedule(interval=interval, lazy=True, **options)  # type: ignore[arg-type]
    steps: list[int] = []
    for step in range(10_000):
        if schedule.is_due(step):
            if len(steps) > len(similarities):
                break
            schedule.refreshed(step, similarities[len(steps) - 1] if steps else None)
            steps.append(step)
    return steps


def test_the_interval_doubles_after_five_similar_bases_and_again() -> None:
    # five similarities are six refreshes; the memory is kept, so each further one doubles too
    assert run_schedule([1.0] * 8) == [0, 10, 20, 30, 40, 50, 70, 110, 190]
    # a mean of 0.4 is enough; below it nothing happens
    assert run_schedule([0.4] * 6)[-1] == 70
    assert run_schedule([0.39] * 6)[-1] == 60


def test_random_signs_do_not_hide_a_standing_subspace() -> None:
    """The published rule takes the signs for change and never doubles; ours does."""
    basis = basis_of(decaying((48, 32)), 6)
    generator = torch.Generator().manual_seed(3)
    flips = torch.randint(0, 2, (8, 6), generator=generator) * 2 - 1
    # as published: half of the first vectors' cosines are -1, and no five of them have a mean of 0.4
    flips[:, 0] = torch.tensor([1, -1, -1, 1, 1, -1, -1, 1])
    bases = [basis * row for row in flips]
    pairs = list(itertools.pairwise(bases))
    published = [similarity(old, new, "signed_top1") for old, new in pairs]
    ours = [similarity(old, new, "overlap") for old, new in pairs]
    assert run_schedule(published)[-1] == 70
    assert run_schedule(ours)[-1] == 110


def test_second_refreshes_are_spread() -> None:
    seconds = [run_schedule([1.0], phase=index / 10)[1] for index in range(10)]
    assert seconds == list(range(10, 20))


def test_a_fixed_schedule_keeps_its_interval() -> None:
    schedule = RefreshSchedule(interval=4, lazy=False)
    steps = []
    for step in range(21):
        if schedule.is_due(step):
            schedule.refreshed(step, 1.0)
            steps.append(step)
    assert steps == [0, 4, 8, 12, 16, 20]
    assert fixed_refreshes(21, 4) == 6
    assert fixed_refreshes(20, 4) == 5
