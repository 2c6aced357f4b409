"""What settings are accepted, and how the rest is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compression.checkpoint import DenseLinear, Int4Linear, LowRankLinear, Manifest, Matrix
from training.spec import METHODS, Lora, QGaLore, SettingsError, check_source, parse_settings

DENSE = DenseLinear(out_features=8, in_features=8, dtype="BF16")
INT4 = Int4Linear(out_features=8, in_features=64, dtype="BF16", group_size=32, symmetric=True)
LOW_RANK = LowRankLinear(
    weight_u=replace(DENSE, in_features=2), weight_v=replace(DENSE, out_features=2)
)


def manifest(linear: Any = DENSE, kind: Any = "decoder", sparsity: float = 0.0) -> Manifest:
    matrix = Matrix(name="model.layers.0.mlp.up_proj", linear=linear, sparsity=sparsity)
    return Manifest(kind=kind, source={}, matrices=(matrix,), other_tensors={})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_parsed_by_name_and_survives_json(name: str) -> None:
    settings = parse_settings({"method": name})
    assert settings.method == METHODS[name]()
    assert settings.peak_learning_rate == METHODS[name].default_learning_rate
    assert parse_settings(json.loads(json.dumps(settings.to_json()))) == settings


def test_options_are_taken() -> None:
    settings = parse_settings(
        {"method": {"qgalore": {"rank": 4, "refresh": "warm"}}, "learning_rate": 0.5, "epochs": 3}
    )
    assert settings.method == QGaLore(rank=4, refresh="warm")
    assert (settings.peak_learning_rate, settings.epochs) == (0.5, 3)


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({}, "method"),
        ([], ""),
        ({"method": "adamw"}, "method"),
        ({"method": {"full": {}, "lora": {}}}, "method"),
        ({"method": {"full": 3}}, "method.full"),
        ({"method": {"full": {"rank": 3}}}, "method.full.rank"),
        ({"method": {"full": {"state_bits": 16}}}, "method.full.state_bits"),
        ({"method": {"full": {"per_layer": 1}}}, "method.full.per_layer"),
        ({"method": {"galore": {"rank": 0}}}, "method.galore.rank"),
        ({"method": {"galore": {"rank": True}}}, "method.galore.rank"),
        ({"method": {"galore": {"scale": 0}}}, "method.galore.scale"),
        ({"method": {"galore": {"lazy": True}}}, "method.galore.lazy"),
        ({"method": {"qgalore": {"similarity": "top1"}}}, "method.qgalore.similarity"),
        ({"method": {"qgalore": {"refresh": "qr"}}}, "method.qgalore.refresh"),
        ({"method": {"lora": {"dropout": 1}}}, "method.lora.dropout"),
        ({"method": {"qlora": {"bits": 3}}}, "method.qlora.bits"),
        ({"method": "full", "epoch": 1}, "epoch"),
        ({"method": "full", "epochs": 1.5}, "epochs"),
        ({"method": "full", "max_steps": 0}, "max_steps"),
        ({"method": "full", "learning_rate": "auto"}, "learning_rate"),
        ({"method": "full", "learning_rate": float("nan")}, "learning_rate"),
        ({"method": "full", "dtype": "float16"}, "dtype"),
        ({"method": "full", "max_length": 1}, "max_length"),
        ({"method": "full", "evaluation_share": 1}, "evaluation_share"),
        ({"method": "full", "packing": None}, "packing"),
        ({"method": "full", "seed": 2**31}, "seed"),
    ],
)
def test_a_wrong_field_is_named(payload: Any, param: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(payload)
    assert caught.value.param == param
    assert caught.value.message


@pytest.mark.parametrize(
    ("method", "source", "word"),
    [
        ("full", manifest(kind="encoder"), "decoders"),
        ("lrc_only", manifest(), "welore"),
        ("lrc_only_qgalore", manifest(INT4), "welore"),
        ("lora", manifest(sparsity=0.5), "zeros"),
        ("qlora", manifest(sparsity=0.5), "zeros"),
        ("qlora", manifest(INT4), "second time"),
        ("qlora", manifest(replace(LOW_RANK, weight_v=replace(INT4, out_features=2))), "second"),
    ],
)
def test_a_method_that_makes_no_sense_is_refused(method: str, source: Manifest, word: str) -> None:
    with pytest.raises(SettingsError, match=word) as caught:
        check_source(parse_settings({"method": method}), source, {})
    assert caught.value.unsupported
    assert caught.value.param == f"method.{method}"


@pytest.mark.parametrize("linear", [DENSE, INT4, LOW_RANK])
@pytest.mark.parametrize("method", ["full", "galore", "qgalore", "lora"])
def test_every_kind_can_be_trained(method: str, linear: Any) -> None:
    check_source(parse_settings({"method": method}), manifest(linear), {})


def test_low_rank_methods_take_low_rank_models() -> None:
    for method in ("lrc_only", "lrc_only_qgalore"):
        check_source(parse_settings({"method": method}), manifest(LOW_RANK), {})


@pytest.mark.parametrize("field", ["max_position_embeddings", "sliding_window"])
def test_rows_longer_than_the_model_sees_are_refused(field: str) -> None:
    settings = parse_settings({"method": "full", "max_length": 65})
    check_source(settings, manifest(), {field: 65})
    with pytest.raises(SettingsError, match=field) as caught:
        check_source(settings, manifest(), {field: 64})
    assert caught.value.param == "max_length"


def test_qlora_is_a_lora() -> None:
    assert isinstance(parse_settings({"method": {"qlora": {"rank": 2}}}).method, Lora)


def test_what_the_api_process_imports_has_no_torch() -> None:
    code = (
        "import sys, training.spec, training.data, training.ledger\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)
