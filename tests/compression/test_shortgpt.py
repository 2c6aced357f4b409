"""Block influence by hand, in batches, and on the hidden states of transformers' Llama."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compression.pruning.shortgpt import BlockInfluence, select_layers


def test_layers_worked_by_hand() -> None:
    # layer 0 scales, which is no turn; layer 1 turns one row by 90 and one by 45 degrees; layer 2 turns round
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    influence = BlockInfluence(num_layers=3)
    influence.add(0, before, before * 3)
    influence.add(1, before[:1], torch.tensor([[0.0, 5.0]]))
    influence.add(1, before[1:], torch.tensor([[1.0, 1.0]]))
    influence.add(2, before.bfloat16(), -before.bfloat16())
    assert influence.influence() == pytest.approx([0, 1 - math.sqrt(0.5) / 2, 2], abs=1e-6)
    assert select_layers(influence.influence(), 2) == [0, 1]


def test_on_the_hidden_states_of_a_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    influence = BlockInfluence(num_layers=3)
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output, index=index: influence.add(index, inputs[0], output)
        )
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        states = model.model(torch.arange(10)[None], output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    for index in range(2):  # transformers normalises the last state it reports
        before, after = states[index][0].double(), states[index + 1][0].double()
        cosine = (before * after).sum(dim=1) / (before.norm(dim=1) * after.norm(dim=1))
        assert influence.influence()[index] == pytest.approx(1 - float(cosine.mean()), abs=1e-6)


def test_the_least_influence_goes_first_and_of_equals_the_later_layer() -> None:
    influence = [0.9, 0.1, 0.3, 0.1, 0.05]
    assert select_layers(influence, 0) == []
    assert select_layers(influence, 3) == [4, 3, 1]
    with pytest.raises(ValueError, match="cannot remove 5 of 5"):
        select_layers(influence, 5)
    with pytest.raises(ValueError, match="not finite"):
        select_layers([0.1, math.nan], 1)


def test_states_that_do_not_pair_and_layers_unseen_are_refused() -> None:
    influence = BlockInfluence(num_layers=2)
    influence.add(0, torch.zeros(1, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="layer 1 has seen no row"):
        influence.influence()
    with pytest.raises(ValueError, match="before"):
        influence.add(1, torch.ones(1, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="layer 1: hidden states are not finite"):
        influence.add(1, torch.ones(1, 4), torch.full((1, 4), torch.nan))
    assert influence.num_rows == [1, 0]
