"""Predictions against what compression then gives."""

from pathlib import Path
from typing import Any

import pytest

from compression.checkpoint import open_checkpoint
from compression.pipeline import compress
from compression.plan import plan
from compression.recipe import Calibration, parse_recipe
from tests.compression.models import calibration_tokens, save_and_import, tiny_decoder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return save_and_import(tiny_decoder(), folder / "hf", folder / "models")


UNIFORM = {"count": "all", "allocation": "uniform", "rank_multiple": 8}


@pytest.mark.parametrize(
    "stages",
    [
        [{"int4": {"group_size": 32, "symmetric": False}}],
        [{"wanda": {"sparsity": 0.5}}],
        [{"magnitude": {"sparsity": "2:4"}}],
        [{"magnitude": {"sparsity": "2:4"}}, {"int4": {"group_size": 32}}],
        [{"welore": {"err": 0.5, **UNIFORM}}, {"int8": {}}],
        [{"structured": {"ffn_width": 128}}, {"int4": {"group_size": 64}}],
        [{"structured": {"num_key_value_heads": 1, "heads_per_group": 1}}],
        [{"welore": {"err": 0.5, **UNIFORM}}, {"int4": {"group_size": 32}}],
    ],
)
def test_what_depends_on_shapes_alone_is_predicted_exactly(
    source: Path, tmp_path: Path, stages: list[dict[str, Any]]
) -> None:
    recipe = parse_recipe(stages)
    model = open_checkpoint(source).manifest.to_json() | {"head_dim": 16}
    predicted = plan(model, recipe, Calibration())
    tokens = calibration_tokens() if recipe.calibrated else None
    manifest = compress(source, tmp_path / "out", recipe, source_id="tiny", calibration=tokens)
    assert predicted.parameters.least == predicted.parameters.most == manifest.parameters
    assert predicted.bytes.least == predicted.bytes.most == manifest.tensor_bytes


@pytest.mark.parametrize("count", ["all", "lrc_only"])
@pytest.mark.parametrize("err", [0.2, 0.5])
def test_welore_ends_between_the_least_and_the_most(
    source: Path, tmp_path: Path, err: float, count: str
) -> None:
    recipe = parse_recipe([{"welore": {"err": err, "count": count, "rank_multiple": 1}}])
    predicted = plan(open_checkpoint(source).manifest.to_json(), recipe, Calibration())
    manifest = compress(source, tmp_path / "out", recipe, source_id="tiny")
    assert predicted.parameters.least <= manifest.parameters <= predicted.parameters.most
    assert predicted.parameters.least < predicted.parameters.most <= predicted.parameters_before


def test_calibration_and_larger_blocks_need_more_memory(source: Path) -> None:
    model = open_checkpoint(source).manifest.to_json()

    def peak(stages: list[dict[str, Any]], samples: int = 32) -> int:
        return plan(model, parse_recipe(stages), Calibration(samples=samples)).peak_memory_bytes

    plain = peak([{"int4": {}}])
    calibrated = peak([{"int4": {"method": "gptq"}}])
    assert plain < calibrated < peak([{"int4": {"method": "gptq"}}], samples=64)


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_flap_ends_between_the_least_and_the_most(
    source: Path, tmp_path: Path, sparsity: float
) -> None:
    recipe = parse_recipe([{"flap": {"sparsity": sparsity}}])
    model = open_checkpoint(source).manifest.to_json()
    with pytest.raises(ValueError, match="head_dim"):
        plan(model, recipe, Calibration())
    predicted = plan(model | {"head_dim": 16}, recipe, Calibration())
    manifest = compress(
        source, tmp_path / "out", recipe, source_id="tiny", calibration=calibration_tokens()
    )
    assert predicted.parameters.least <= manifest.parameters <= predicted.parameters.most
    assert predicted.parameters.least < predicted.parameters.most
