"""Slices against transformers' own model with the same parts silenced; FLAP against the error it predicts."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compression.pruning.flap import (
    bias_compensation,
    fluctuation_score,
    select_units,
    standardise,
)
from compression.pruning.structured import (
    ffn_width,
    head_importance,
    select_heads,
    select_neurons,
)
from compression.statistics import InputStatistics

HEAD_DIM = 8


def build_llama(*, num_heads: int, num_key_value_heads: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=HEAD_DIM,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def logits(model: LlamaForCausalLM) -> Tensor:
    result: Tensor = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits
    return result


@pytest.mark.parametrize(
    ("keep_groups", "keep_heads_per_group", "width"),
    [(2, 2, 64), (1, 3, 64), (2, 3, 96), (1, 1, 1)],
)
def test_a_sliced_llama_equals_one_with_the_same_parts_silenced(
    keep_groups: int, keep_heads_per_group: int, width: int
) -> None:
    model = build_llama(num_heads=6, num_key_value_heads=2, width=96)
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        attention = select_heads(
            torch.rand(6, generator=generator),
            num_key_value_heads=2,
            head_dim=HEAD_DIM,
            keep_groups=keep_groups,
            keep_heads_per_group=keep_heads_per_group,
        )
        neurons = select_neurons(torch.rand(96, generator=generator), width)
        for name, dim, index in (
            ("self_attn.q_proj", 0, attention.query_rows),
            ("self_attn.k_proj", 0, attention.key_value_rows),
            ("self_attn.v_proj", 0, attention.key_value_rows),
            ("self_attn.o_proj", 1, attention.query_rows),
            ("mlp.gate_proj", 0, neurons),
            ("mlp.up_proj", 0, neurons),
            ("mlp.down_proj", 1, neurons),
        ):
            key = f"{prefix}.{name}.weight"
            state[key] = state[key].index_select(dim, index)
        block = model.model.layers[layer]
        for linear, index in (
            (block.self_attn.o_proj, attention.query_rows),
            (block.mlp.down_proj, neurons),
        ):
            silenced = torch.ones(linear.in_features, dtype=torch.bool)
            silenced[index] = False
            linear.weight[:, silenced] = 0
    sliced = build_llama(
        num_heads=attention.num_heads,
        num_key_value_heads=attention.num_key_value_heads,
        width=width,
    )
    sliced.load_state_dict(state)
    torch.testing.assert_close(logits(sliced), logits(model), atol=1e-5, rtol=1e-5)


def test_heads_are_ranked_within_their_group_and_groups_by_what_they_keep() -> None:
    # groups (1, 5, 2), (4, 0, 4), (3, 3, 9): keeping one head they are worth 5, 4, 9; keeping two 7, 8, 12
    importance_H = torch.tensor([1.0, 5, 2, 4, 0, 4, 3, 3, 9])

    def heads(keep_groups: int, keep_heads_per_group: int) -> tuple[list[int], list[int]]:
        kept = select_heads(
            importance_H,
            num_key_value_heads=3,
            head_dim=1,
            keep_groups=keep_groups,
            keep_heads_per_group=keep_heads_per_group,
        )
        return kept.query_rows.tolist(), kept.key_value_rows.tolist()

    assert heads(2, 1) == ([1, 8], [0, 2])
    assert heads(2, 2) == ([3, 5, 7, 8], [1, 2])
    assert heads(3, 3) == (list(range(9)), [0, 1, 2])


def test_the_importance_of_a_head_is_reduced_over_its_channels() -> None:
    importance_I = torch.tensor([3.0, 4, 0, 2, 1, 1, 6, 8])
    assert head_importance(importance_I, 4, reduction="norm").tolist() == pytest.approx(
        [5, 2, 2**0.5, 10]
    )
    assert head_importance(importance_I, 2, reduction="mean").tolist() == [2.25, 4]


def test_widths_are_multiples_near_the_target() -> None:
    assert [ffn_width(1536, sparsity) for sparsity in (0, 0.2, 0.5, 0.99)] == [1536, 1216, 768, 64]
    assert ffn_width(1536, 0.2, multiple=256) == 1280
    assert ffn_width(100, 0.0) == 100
    assert ffn_width(48, 0.5) == 48
    with pytest.raises(ValueError, match="sparsity"):
        ffn_width(64, 1.0)


def test_neurons_that_tie_are_settled_by_place() -> None:
    assert select_neurons(torch.tensor([1.0, 2, 1, 2, 1]), 3).tolist() == [1, 3, 4]
    with pytest.raises(ValueError, match="cannot keep 6 of 5"):
        select_neurons(torch.ones(5), 6)
    with pytest.raises(ValueError, match="not finite"):
        select_neurons(torch.tensor([1.0, torch.nan]), 1)
    with pytest.raises(ValueError, match="do not divide"):
        select_heads(
            torch.ones(5), num_key_value_heads=2, head_dim=4, keep_groups=1, keep_heads_per_group=1
        )


def fluctuating_rows() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x_NI = torch.randn(300, 12, generator=generator) * torch.rand(12, generator=generator)
    return x_NI + torch.randn(12, generator=generator) * 5


def test_the_fluctuation_score_is_the_error_that_compensation_leaves() -> None:
    x_NI = fluctuating_rows()
    weight_OI = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
    statistics = InputStatistics(name="x", num_channels=12)
    statistics.add(x_NI)
    score_I = fluctuation_score(weight_OI, statistics.variance)
    for channel in range(12):
        keep_K = torch.tensor([i for i in range(12) if i != channel])
        bias_O = bias_compensation(weight_OI, statistics.mean_I, keep_K)
        outputs = x_NI[:, keep_K] @ weight_OI[:, keep_K].T + bias_O
        error = (outputs - x_NI @ weight_OI.T).square().sum() / (len(x_NI) - 1)
        assert float(error) == pytest.approx(float(score_I[channel]), rel=1e-3)


def test_compensation_keeps_the_mean_output() -> None:
    x_NI = fluctuating_rows()
    weight_OI = torch.randn(7, 12, generator=torch.Generator().manual_seed(3))
    keep_K = torch.tensor([0, 3, 7])
    bias_O = bias_compensation(weight_OI, x_NI.double().mean(dim=0), keep_K)
    outputs = x_NI[:, keep_K] @ weight_OI[:, keep_K].T + bias_O
    torch.testing.assert_close(
        outputs.mean(dim=0), (x_NI @ weight_OI.T).mean(dim=0), atol=1e-4, rtol=1e-4
    )


def test_units_of_all_layers_compete_at_their_price() -> None:
    # standardised: (-1, 1), (-1, 1) and (-sqrt 1.5, 0, sqrt 1.5); heads cost 3, neurons 1, so all weigh 13
    scores = [torch.tensor([5.0, 9.0]), torch.tensor([2.0, 1.0]), torch.tensor([10.0, 20.0, 30.0])]

    def kept(sparsity: float) -> list[list[int]]:
        return [index.tolist() for index in select_units(scores, [3, 2, 1], sparsity)]

    assert kept(0.0) == [[0, 1], [0, 1], [0, 1, 2]]
    assert kept(1 / 13) == [[0, 1], [0, 1], [1, 2]]
    assert kept(4 / 13) == [[1], [0, 1], [1, 2]]
    assert kept(6 / 13) == [[1], [0], [1, 2]]
    assert kept(0.999) == [[1], [0], [2]]
    with pytest.raises(ValueError, match="sparsity"):
        kept(1.0)
    with pytest.raises(ValueError, match="finite"):
        select_units([torch.tensor([torch.nan])], [1], 0.5)


def test_scores_that_are_all_equal_standardise_to_zero() -> None:
    assert standardise(torch.full((3,), 7.0)).tolist() == [0, 0, 0]
    assert standardise(torch.tensor([1.0, 3.0])).tolist() == [-1, 1]


def test_a_score_of_another_width_or_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="variance of 3"):
        fluctuation_score(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        fluctuation_score(torch.ones(2, 2), torch.tensor([1.0, torch.nan]))
