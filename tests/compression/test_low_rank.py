"""WeLore: ranks against published thresholds and worked examples, factors against torch's SVD."""

import pytest
import torch
from torch import Tensor

from compression.low_rank.factors import break_even_rank, factor, singular_values, spectrum
from compression.low_rank.ranks import RankChoice, choose_ranks, normalise, uniform_ranks
from compression.recipe import RankCount

# arXiv:2407.11239's public thresholds for LLaMA-2-7B at ERR 10, 20, ... 70 %
TARGETS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
PUBLISHED: dict[RankCount, list[float]] = {
    "lrc_only": [0.065, 0.084, 0.115, 0.145, 0.175, 0.215, 0.26],
    "all": [0.0225, 0.0495, 0.076, 0.105, 0.135, 0.17, 0.21],
}
LLAMA_2_7B_RANK = 4096
LLAMA_2_7B_MATRICES = 32 * 7


def spectra_matching(count: RankCount) -> dict[str, Tensor]:
    """224 spectra of 4,096 values, in LLaMA-2-7B's shapes, that put each published threshold at its ERR."""
    if count == "all":  # every matrix has the published quantiles
        points = torch.tensor([0.0, *PUBLISHED["all"], 1.0], dtype=torch.float64)
        at = torch.tensor([0.0, *TARGETS, 1.0], dtype=torch.float64)
        x = torch.linspace(0, 1, LLAMA_2_7B_RANK, dtype=torch.float64)
        index = torch.searchsorted(at, x, right=True).clamp(max=len(at) - 1)
        share = (x - at[index - 1]) / (at[index] - at[index - 1])
        values = points[index - 1] + share * (points[index] - points[index - 1])
        return {str(i): values for i in range(LLAMA_2_7B_MATRICES)}
    spectra = {}
    for i in range(LLAMA_2_7B_MATRICES):  # 28 matrices at a time lose 80 % = 10 % of all ranks
        group = i // 28
        values = torch.ones(LLAMA_2_7B_RANK, dtype=torch.float64)
        low = round(0.8 * LLAMA_2_7B_RANK)
        if group < len(TARGETS):
            values[:low] = PUBLISHED["lrc_only"][group] - 0.001
        else:
            values[:low] = 0.9
        values[0] = 0
        spectra[str(i)] = values
    return spectra


@pytest.mark.parametrize("count", ["all", "lrc_only"])
def test_published_thresholds_are_found(count: RankCount) -> None:
    spectra = spectra_matching(count)
    for target, threshold in zip(TARGETS, PUBLISHED[count], strict=True):
        choice = choose_ranks(spectra, target, count=count, multiple=1)
        assert choice.threshold == pytest.approx(threshold, abs=0.005)
        assert choice.err == pytest.approx(target, abs=0.001)


def decaying(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steepness = 1 + 6 * torch.rand(1, generator=generator)
    return torch.exp(-steepness * torch.linspace(0, 1, size)) + 0.01 * torch.rand(
        size, generator=generator
    )


@pytest.mark.parametrize("count", ["all", "lrc_only"])
@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5])
def test_the_target_is_hit_within_a_tenth_of_a_point(
    count: RankCount, multiple: int, target: float
) -> None:
    # 30 blocks in SmolLM2's shapes
    spectra = {
        f"{block}.{index}": decaying(7 * block + index, size)
        for block in range(30)
        for index, size in enumerate((576, 192, 192, 576, 576, 576, 576))
    }
    choice = choose_ranks(spectra, target, count=count, multiple=multiple)
    assert choice.err == pytest.approx(target, abs=0.001)
    _check_accounts(choice, spectra, count, multiple)


def _check_accounts(
    choice: RankChoice, spectra: dict[str, Tensor], count: RankCount, multiple: int
) -> None:
    sizes = {name: values.numel() for name, values in spectra.items()}
    assert choice.err == pytest.approx(1 - sum(choice.ranks.values()) / sum(sizes.values()))
    for name, rank in choice.ranks.items():
        assert 1 <= rank <= sizes[name]
        assert rank % multiple == 0 or rank == sizes[name]
        assert (name in choice.lrc) == (sizes[name] - rank > sizes[name] / 2)
        if count == "lrc_only" and name not in choice.lrc:
            assert rank == sizes[name]


def test_a_small_case_worked_by_hand() -> None:
    # normalised: a = 0, .1, .2, 1 and b = 0, .5, .75, 1; of 8 ranks 4 go up to .2: three of a, one of b
    spectra = {"a": torch.tensor([10.0, 0, 1, 2]), "b": torch.tensor([5.0, 1, 3, 4])}
    choice = choose_ranks(spectra, 0.5, count="all", multiple=1)
    assert choice.ranks == {"a": 1, "b": 3}
    assert choice.lrc == {"a"}
    assert choice.threshold == pytest.approx(0.2)
    # the others keep their weight: b's one rank no longer counts
    assert choose_ranks(spectra, 0.375, count="lrc_only", multiple=1).ranks == {"a": 1, "b": 4}


def test_exactly_half_is_no_lrc() -> None:
    spectra = {"half": torch.tensor([0.0, 0.1, 0.9, 1.0]), "flat": torch.ones(4)}
    assert choose_ranks(spectra, 0.25, count="all", multiple=1).lrc == frozenset()
    assert choose_ranks(spectra, 0.375, count="all", multiple=1).lrc == {"half"}
    assert choose_ranks(spectra, 0.375, count="all", multiple=1).ranks["flat"] == 4


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        choose_ranks({"flat": torch.ones(8)}, 0.5, count="all", multiple=1)
    with pytest.raises(ValueError, match="not finite"):
        choose_ranks({"bad": torch.tensor([1.0, torch.nan])}, 0.5, count="all", multiple=1)


def test_normalised_values_span_zero_to_one() -> None:
    assert normalise(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert normalise(torch.tensor([2.0])).tolist() == [1.0]


def test_uniform_ranks_round_to_the_nearest_multiple() -> None:
    choice = uniform_ranks({"a": 576, "b": 192, "c": 20}, 0.5, multiple=64)
    assert choice.ranks == {"a": 256, "b": 128, "c": 20}
    assert choice.err == pytest.approx(1 - 404 / 788)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 4), (4, 9), (16, 16), (33, 20)])
def test_factors_are_the_truncated_svd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight_OI = torch.randn(shape, generator=generator)
    found = spectrum(weight_OI)
    expected = torch.linalg.svdvals(weight_OI.double())
    torch.testing.assert_close(found.singular_values_R, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(singular_values(weight_OI), expected, atol=1e-6, rtol=1e-6)
    u, s, vh = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    for rank in {1, (min(shape) + 1) // 2, min(shape)}:
        u_OK, v_KI = factor(weight_OI, found.basis_OR, rank)
        truncated = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close((u_OK @ v_KI).double(), truncated, atol=1e-5, rtol=1e-5)
        # the symmetric split
        torch.testing.assert_close(u_OK.norm(dim=0).double(), s[:rank].sqrt(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(v_KI.norm(dim=1).double(), s[:rank].sqrt(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_whitened_factors_are_those_of_svd_llm(shape: tuple[int, int]) -> None:
    """Reference: SVD of W S with G = S S^T, and S undone afterwards."""
    generator = torch.Generator().manual_seed(3)
    weight_OI = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale_I = torch.logspace(0, 2, shape[1], dtype=torch.float64)
    x_NI = torch.randn(64, shape[1], generator=generator, dtype=torch.float64) * scale_I
    gram_II = x_NI.T @ x_NI
    rank = 3
    lower_II = torch.linalg.cholesky(gram_II)
    u, s, vh = torch.linalg.svd(weight_OI @ lower_II, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(lower_II)
    found = spectrum(weight_OI, gram_II)
    torch.testing.assert_close(found.singular_values_R, s, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(singular_values(weight_OI, gram_II), s, atol=1e-6, rtol=1e-6)
    u_OK, v_KI = factor(weight_OI, found.basis_OR, rank)
    torch.testing.assert_close((u_OK @ v_KI).double(), expected, atol=1e-4, rtol=1e-4)
    plain_OK, plain_KI = factor(weight_OI, spectrum(weight_OI).basis_OR, rank)
    error = (x_NI @ (u_OK @ v_KI - weight_OI).T).norm()
    assert error < (x_NI @ (plain_OK @ plain_KI - weight_OI).T).norm()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_singular_gram_matrix_and_a_zero_weight_do_no_harm(shape: tuple[int, int]) -> None:
    weight_OI = torch.zeros(shape)
    weight_OI[0, 0] = 2
    gram_II = torch.zeros(shape[1], shape[1])
    gram_II[0, 0] = 1
    for gram in (None, gram_II):
        u_OK, v_KI = factor(weight_OI, spectrum(weight_OI, gram).basis_OR, 3)
        torch.testing.assert_close(u_OK @ v_KI, weight_OI)
    with pytest.raises(ValueError, match="not finite"):
        spectrum(torch.full(shape, torch.nan))
    with pytest.raises(ValueError, match="rank"):
        factor(weight_OI, spectrum(weight_OI).basis_OR, 0)


def test_break_even() -> None:
    assert break_even_rank(576, 576) == 288
    assert break_even_rank(192, 576) == 144
