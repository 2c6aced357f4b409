"""Recipes: what is accepted, what is refused, and the field that a refusal names."""

from typing import Any

import pytest

from compression.checkpoint import Manifest
from compression.recipe import STAGES, Calibration, RecipeError, parse_recipe
from jobs.spec import CompressSpec, SpecError, check_source, parse_spec, spec_json

WELORE = {"welore": {"err": 0.3}}
WANDA = {"wanda": {"sparsity": 0.5}}
INT4: dict[str, Any] = {"int4": {}}


@pytest.mark.parametrize(
    ("stages", "param", "message"),
    [
        ([], "recipe", "at least one"),
        ([{"welore": {}}], "recipe[0].welore.err", "required"),
        ([{"welore": {"err": 1}}], "recipe[0].welore.err", "between 0 and 1"),
        ([{"welore": {"err": True}}], "recipe[0].welore.err", "between 0 and 1"),
        ([{"welore": {"err": float("nan")}}], "recipe[0].welore.err", "between 0 and 1"),
        ([{"welore": {"err": 0.3, "count": "some"}}], "recipe[0].welore.count", "lrc_only"),
        ([{"welore": {"err": 0.3, "allocation": "uniform"}}], "recipe[0].welore.count", "'all'"),
        ([{"welore": {"err": 0.3, "rank_multiple": 7}}], "recipe[0].welore.rank_multiple", "7"),
        ([{"welore": {"err": 0.3, "rank_multiple": True}}], "recipe[0].welore.rank_multiple", ""),
        ([{"wanda": {"sparsity": "4:2"}}], "recipe[0].wanda.sparsity", "N:M"),
        (
            [{"wanda": {"sparsity": "2:4", "allocation": "owl"}}],
            "recipe[0].wanda.allocation",
            "M of at least 8",
        ),
        ([{"wanda": {"sparsity": 0.5, "allocation": 1}}], "recipe[0].wanda.allocation", "owl"),
        ([{"welore": {"err": 0.3, "allocation": "owl"}}], "recipe[0].welore.count", "'all'"),
        ([{"wanda": {"sparsity": 1.5}}], "recipe[0].wanda.sparsity", "between"),
        ([{"structured": {"ffn_width": 100}}], "recipe[0].structured.ffn_width", "multiple of 64"),
        ([{"structured": {}}], "recipe[0].structured.ffn_width", "one of"),
        (
            [{"structured": {"heads_per_group": 0}}],
            "recipe[0].structured.heads_per_group",
            "at least 1",
        ),
        ([{"flap": {"sparsity": 0}}], "recipe[0].flap.sparsity", "between 0 and 1"),
        (
            [{"flap": {"sparsity": 0.2}}, {"structured": {"ffn_width": 64}}],
            "recipe[1].structured",
            "chosen by what came before",
        ),
        ([{"shortgpt": {"remove": 0}}], "recipe[0].shortgpt.remove", "at least 1"),
        ([{"int4": {"method": "best"}}], "recipe[0].int4.method", "gptq"),
        ([{"int4": {"group_size": 48}}], "recipe[0].int4.group_size", "64"),
        ([{"int4": {"bits": 4}}], "recipe[0].int4", "unknown option"),
        ([{"nf4": {}}], "recipe[0].nf4", "for comparison only"),
        ([{"int8": {"group_size": 64}}], "recipe[0].int8", "unknown option"),
        ([INT4, {"int8": {}}], "recipe[1].int8", "codes cannot be changed"),
        ([{"ffn_skip": {}}], "recipe[0].ffn_skip", "calibrate_skip"),
        ([{"magic": {}}], "recipe[0]", "unknown stage"),
        ([INT4, INT4], "recipe[1].int4", "codes cannot be changed"),
        ([INT4, WELORE], "recipe[1].welore", "codes cannot be changed"),
        ([WELORE, WELORE], "recipe[1].welore", "second factoring"),
        ([WELORE, {"structured": {"ffn_width": 64}}], "recipe[1].structured", "neurons to cut"),
        ([{"wanda": {"sparsity": 0.5}}, WELORE], "recipe[1].welore", "undoes its zeros"),
        (
            [{"wanda": {"sparsity": 0.5}}, {"int4": {"method": "gptq"}}],
            "recipe[1].int4.method",
            "off zero",
        ),
    ],
)
def test_a_refusal_names_the_field_and_the_reason(
    stages: list[dict[str, Any]], param: str, message: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(stages)
    assert refused.value.param == param
    assert message in refused.value.message


def test_all_stages_in_their_order_make_a_recipe_that_reads_itself() -> None:
    stages: list[dict[str, Any]] = [
        {"shortgpt": {"remove": 2}},
        {"structured": {"ffn_width": 128}},
        {"welore": {"err": 0.3, "calibration": "activation"}},
        {"magnitude": {"sparsity": "2:4"}},
        {"int4": {"method": "awq", "group_size": 32}},
    ]
    recipe = parse_recipe(stages)
    assert parse_recipe(recipe.to_json()) == recipe
    assert recipe.calibrated
    assert not parse_recipe([WELORE, INT4]).calibrated
    assert not parse_recipe([{"magnitude": {"sparsity": 0.5}}]).calibrated
    assert parse_recipe([{"magnitude": {"sparsity": 0.5, "allocation": "owl"}}]).calibrated
    assert {next(iter(stage)) for stage in stages} < STAGES.keys()


def test_what_was_done_before_counts() -> None:
    parse_recipe([INT4], done=[WELORE])
    with pytest.raises(RecipeError, match="welore cannot follow int4"):
        parse_recipe([WELORE], done=[INT4])


def spec(**changes: Any) -> dict[str, Any]:
    body = {"type": "compress", "model": "m", "output": "o", "recipe": [{"int4": {}}]}
    return body | changes


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (
            spec(calibration={"corpus": "state-of-the-union"}),
            "calibration",
            "unsupported_parameter",
        ),
        (spec(calibration={"file": "file-1"}), "calibration", "unsupported_parameter"),
        (spec(recipe=[WANDA], calibration={"file": "../x"}), "calibration.file", "invalid_value"),
        (
            spec(recipe=[WANDA], calibration={"file": "file-1", "corpus": "wikipedia-summaries"}),
            "calibration",
            "invalid_value",
        ),
        (
            spec(recipe=[{"int4": {"method": "gptq"}}], calibration={"corpus": "c4"}),
            "calibration.corpus",
            "invalid_value",
        ),
        (
            spec(recipe=[{"int4": {"method": "gptq"}}], calibration={"samples": 0}),
            "calibration.samples",
            "invalid_value",
        ),
        (spec(gate={"min_top1_agreement": 1.1}), "gate.min_top1_agreement", "invalid_value"),
        (spec(gate={"min_beauty": 1}), "gate.min_beauty", "unsupported_parameter"),
        (spec(recipe=[{"nf4": {}}]), "recipe[0].nf4", "unsupported_parameter"),
    ],
)
def test_a_job_is_refused_by_the_field(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec(body)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_a_calibrated_job_is_accepted() -> None:
    parsed = parse_spec(spec(recipe=[WANDA], calibration={"samples": 8}))
    assert isinstance(parsed, CompressSpec)
    assert parsed.calibration is not None
    assert parsed.calibration.corpus == "wikipedia-summaries"
    parsed = parse_spec(spec(recipe=[WANDA], calibration={"file": "file-1"}))
    stored = spec_json(parsed)["calibration"]
    assert stored == {"file": "file-1", "samples": 32, "length": 512, "seed": 0}
    assert Calibration(**stored).file == "file-1"


def test_a_job_is_refused_for_what_its_model_went_through() -> None:
    empty: dict[str, Any] = {"source": {}, "matrices": (), "other_tensors": {}}
    parsed = parse_spec(spec(recipe=[WELORE]))
    check_source(parsed, Manifest(kind="decoder", **empty), {})
    with pytest.raises(SpecError, match="welore cannot follow int4") as refused:
        check_source(parsed, Manifest(kind="decoder", recipe=[INT4], **empty), {})
    assert refused.value.param == "recipe[0].welore"
    with pytest.raises(SpecError, match="decoders only"):
        check_source(parsed, Manifest(kind="encoder", **empty), {})
