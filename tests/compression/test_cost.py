"""Costs by hand from made-up rates, and rates that are measured."""

from typing import Any

import pytest

from compression.checkpoint import DenseLinear, Matrix
from compression.cost import MethodRate, Rates, cost, llama_2_7b, measure_rates, work
from compression.plan import plan
from compression.recipe import STAGES, Calibration, parse_recipe

CALIBRATION = Calibration(samples=2, length=5)


def model_of(shapes: dict[str, tuple[int, int]], num_blocks: int) -> dict[str, Any]:
    rows = [
        Matrix(
            name=f"model.layers.{index}.{name}",
            linear=DenseLinear(out_features=o, in_features=i, dtype="F32"),
        )
        for index in range(num_blocks)
        for name, (o, i) in shapes.items()
    ]
    return {"matrices": [row.to_json() for row in rows]}


def test_a_block_worked_by_hand() -> None:
    model = model_of({"self_attn.q_proj": (4, 3), "self_attn.k_proj": (2, 3)}, num_blocks=6)
    recipe = parse_recipe([{"int4": {"method": "gptq"}}])
    rates = Rates(product=0.1, methods={"int4": MethodRate(step=0.5, unit=2.0)})
    # 3 columns each; (4 3^2 + 3^3) + (2 3^2 + 3^3) = 108 units; 10 tokens through 18 weights twice, 3^2 once
    found = cost(model, recipe, CALIBRATION, rates)
    assert found.block_seconds == pytest.approx(0.5 * 6 + 2.0 * 108 + 0.1 * 10 * (2 * 18 + 9))
    assert found.num_blocks == 6
    plain = parse_recipe([{"int4": {}}])
    assert cost(model, plain, CALIBRATION, rates).block_seconds == pytest.approx(0.5 * 2 + 2.0 * 18)


def test_stages_add_up_and_calibration_counts_where_it_is_used() -> None:
    model = model_of({"self_attn.q_proj": (8, 8)}, num_blocks=1)
    rates = Rates(product=1.0, methods=dict.fromkeys(STAGES, MethodRate(step=0, unit=0)))

    def products(stages: list[dict[str, Any]]) -> float:
        seconds = cost(model, parse_recipe(stages), CALIBRATION, rates).block_seconds
        return seconds / (10 * 64)  # passes of all tokens through the one matrix

    owl = {"err": 0.5, "count": "all", "allocation": "owl"}
    assert products([{"magnitude": {"sparsity": 0.5}}]) == 0
    assert products([{"magnitude": {"sparsity": 0.5, "allocation": "owl"}}]) == 1
    assert products([{"shortgpt": {"remove": 1}}, {"wanda": {"sparsity": 0.5}}]) == 3
    assert products([{"sparsegpt": {"sparsity": 0.5}}]) == 3
    assert products([{"flap": {"sparsity": 0.5}}]) == 3
    assert products([{"welore": owl}]) == 1
    assert products([{"welore": {"err": 0.5, "calibration": "activation"}}]) == 5


def test_every_stage_is_measured_and_grows_with_the_matrix() -> None:
    stages: dict[str, list[dict[str, Any]]] = {
        "shortgpt": [{"remove": 1}],
        "structured": [{"ffn_width": 64}],
        "flap": [{"sparsity": 0.5}],
        "welore": [{"err": 0.5}, {"err": 0.5, "calibration": "activation"}],
        "magnitude": [{"sparsity": 0.5}],
        "wanda": [{"sparsity": 0.5}],
        "sparsegpt": [{"sparsity": 0.5}],
        "int4": [{"method": method} for method in ("rtn", "gptq", "awq")],
        "int8": [{}],
    }
    assert stages.keys() == STAGES.keys()
    for name, options in stages.items():
        for option in options:
            recipe = parse_recipe([{name: option}])
            rates = measure_rates(recipe)
            assert rates.product > 0
            assert rates.methods[name].unit > 0
            assert rates.methods[name].step >= 0
            assert work(recipe.stages[0], 64, 64) >= 4 * work(recipe.stages[0], 32, 32)


def test_the_known_model_has_its_known_size() -> None:
    model = llama_2_7b()
    assert model["parameters"] == 6_738_415_616  # as transformers counts them
    recipe = parse_recipe([{"int4": {}}])
    assert plan(model, recipe, Calibration()).bytes.most < 0.4 * model["bytes"]
    assert (
        cost(
            model,
            recipe,
            CALIBRATION,
            Rates(product=1, methods={"int4": MethodRate(step=0, unit=1)}),
        ).num_blocks
        == 32
    )
