"""Substitutes against regressions solved on the rows themselves."""

import pytest
import torch
from torch import Tensor

from compression.ffn_skip.profile import Substitute
from compression.ffn_skip.substitute import (
    Fitted,
    Moments,
    choose_substitute,
    fit_linear,
    fit_mean,
    squared_error,
)

H = 11


def rows(num_rows: int, seed: int, *, noise: float = 0.5, rank: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs with a mean, and outputs that a low-rank map gives but for noise."""
    fixed = torch.Generator().manual_seed(9)
    u_HR = torch.randn(H, rank, generator=fixed)
    v_RH = torch.randn(rank, H, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(num_rows, H, generator=generator) + 0.7
    noise_TH = noise * torch.randn(num_rows, H, generator=generator)
    return x_TH, x_TH @ (u_HR @ v_RH).T + 1.5 + noise_TH


def moments_of(x_TH: Tensor, y_TH: Tensor) -> Moments:
    moments = Moments(H)
    for x, y in zip(torch.split(x_TH, 7), torch.split(y_TH, 7), strict=True):
        moments.add(x, y)
    return moments


def naive_reduced_rank(x_TH: Tensor, y_TH: Tensor, rank: int, ridge: float) -> Tensor:
    """Predictions (T, H): centre, append the penalty as rows, truncate the SVD of the fitted values, solve again."""
    x_TH, y_TH = x_TH.double(), y_TH.double()
    x_mean_H, y_mean_H = x_TH.mean(0), y_TH.mean(0)
    x_TH, y_TH = x_TH - x_mean_H, y_TH - y_mean_H
    n = len(x_TH)
    penalty = (n * ridge * x_TH.square().mean()).sqrt() * torch.eye(H, dtype=torch.float64)
    x_aug, y_aug = torch.cat([x_TH, penalty]), torch.cat([y_TH, torch.zeros_like(penalty)])
    fitted = x_aug @ torch.linalg.lstsq(x_aug, y_aug).solution
    u, s, vh = torch.linalg.svd(fitted, full_matrices=False)
    truncated = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    predicted_TH: Tensor = x_TH @ torch.linalg.lstsq(x_aug, truncated).solution + y_mean_H
    return predicted_TH


@pytest.mark.parametrize("rank", [1, 3, 10])
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_fit_linear_is_the_reduced_rank_ridge_regression(rank: int, ridge: float) -> None:
    x_TH, y_TH = rows(301, 0)
    fitted = fit_linear(moments_of(x_TH, y_TH), rank, ridge=ridge)
    assert fitted.weight_u_HR is not None
    assert fitted.weight_u_HR.shape == (H, rank)
    expected_TH = naive_reduced_rank(x_TH, y_TH, rank, ridge)
    torch.testing.assert_close(fitted(x_TH), expected_TH.float(), rtol=1e-4, atol=1e-3)


def test_fit_mean_is_the_mean() -> None:
    x_TH, y_TH = rows(40, 1)
    fitted = fit_mean(moments_of(x_TH, y_TH))
    torch.testing.assert_close(fitted(x_TH), y_TH.mean(0).expand_as(y_TH))


@pytest.mark.parametrize("kind", ["none", "mean", "linear"])
def test_squared_error_is_that_of_the_rows(kind: str) -> None:
    fit = moments_of(*rows(200, 2))
    fitted = {
        "none": Fitted(substitute=Substitute()),
        "mean": fit_mean(fit),
        "linear": fit_linear(fit, 4),
    }[kind]
    x_TH, y_TH = rows(77, 3)
    direct = float((fitted(x_TH) - y_TH).double().square().sum(dim=1).mean())
    assert squared_error(fitted, moments_of(x_TH, y_TH)) == pytest.approx(direct, rel=1e-4)


def test_each_layer_gets_the_kind_that_holds_out_best() -> None:
    held_out = moments_of(*rows(400, 5))
    assert choose_substitute(moments_of(*rows(400, 4)), held_out, rank=3)[0].substitute == (
        Substitute(kind="linear", rank=3)
    )
    # Outputs that do not depend on the input: on 13 rows a map of rank 8 finds chance only.
    generator = torch.Generator().manual_seed(6)

    def unrelated(n: int, mean: float) -> Moments:
        x_TH = torch.randn(n, H, generator=generator)
        return moments_of(x_TH, torch.randn(n, H, generator=generator) + mean)

    chosen, missed = choose_substitute(unrelated(13, 2.0), unrelated(500, 2.0), rank=8)
    assert chosen.substitute == Substitute(kind="mean")
    assert 0.1 < missed < 0.3  # the mean's power is 4 of 5
    chosen, missed = choose_substitute(unrelated(13, 0.0), unrelated(500, 0.0), rank=8)
    assert chosen.substitute == Substitute()
    assert missed == 1
    assert chosen(torch.ones(2, H)).tolist() == torch.zeros(2, H).tolist()
