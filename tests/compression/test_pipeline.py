"""The pipeline: statistics against transformers' own hidden states, composition, resume after a kill, refusals."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.block import list_blocks, load_block
from compression.calibration import BlockRunner, CalibrationError, sample_tokens
from compression.checkpoint import (
    LowRankLinear,
    Manifest,
    checkpoint_hash,
    open_checkpoint,
    verify_checkpoint,
)
from compression.hf import load_model, read_config
from compression.low_rank.factors import factor, spectrum
from compression.pipeline import compress
from compression.pruning.shortgpt import BlockInfluence
from compression.quantization.gptq import gptq
from compression.quantization.int4 import dequantize
from compression.recipe import Calibration, Int4, parse_recipe
from compression.safetensors_header import CheckpointError
from compression.stages import StageError, fold_awq_scales
from tests.compression.models import calibration_tokens, save_and_import, tiny_decoder
from tests.reference.pruning import keep_mask

CALIBRATED = [
    [{"wanda": {"sparsity": 0.5}}],
    [{"sparsegpt": {"sparsity": "2:4"}}],
    [{"structured": {"ffn_width": 128}}],
    [{"structured": {"num_key_value_heads": 1, "ffn_width": 64}}],
    [{"wanda": {"sparsity": "4:8", "allocation": "owl"}}],
    [{"flap": {"sparsity": 0.3}}, {"int4": {"group_size": 32, "method": "awq"}}],
    [{"shortgpt": {"remove": 1}}],
    [{"welore": {"err": 0.5, "calibration": "activation", "rank_multiple": 8}}],
    [{"int4": {"method": "gptq", "group_size": 32}}],
    [{"int4": {"method": "awq", "group_size": 32}}],
    [
        {"shortgpt": {"remove": 1}},
        {"welore": {"err": 0.4, "rank_multiple": 8}},
        {"wanda": {"sparsity": 0.5}},
        {"int4": {"group_size": 32}},
    ],
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return save_and_import(tiny_decoder(), folder / "hf", folder / "models")


def run(source: Path, destination: Path, stages: list[dict[str, Any]], **options: Any) -> Manifest:
    recipe = parse_recipe(stages, done=open_checkpoint(source).manifest.recipe)
    tokens = calibration_tokens() if recipe.calibrated else None
    return compress(source, destination, recipe, source_id="tiny", calibration=tokens, **options)


def logits(folder: Path) -> Tensor:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        found: Tensor = load_model(folder, dtype=torch.float32)(ids).logits
    return found


def test_hidden_states_and_statistics_are_transformers_own(source: Path) -> None:
    tokens = calibration_tokens()
    checkpoint = open_checkpoint(source)
    runner = BlockRunner(source, checkpoint, tokens.ids_NS)
    model = load_model(source, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: inputs.update({name: arguments[0]} if arguments else {})
        )
    with torch.no_grad():
        hidden = model(tokens.ids_NS, output_hidden_states=True).hidden_states
    for index, names in enumerate(list_blocks(checkpoint)):
        torch.testing.assert_close(runner.hidden_NSH, hidden[index], atol=1e-5, rtol=1e-5)
        block = load_block(checkpoint, names)
        statistics = runner.statistics(block, gram=True)
        assert statistics.keys() == block.linears.keys()
        assert statistics["self_attn.q_proj"] is statistics["self_attn.v_proj"]
        assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
        for name, found in statistics.items():
            x_RI = inputs[f"{names.prefix}.{name}"].flatten(0, 1)
            assert found.num_rows == tokens.ids_NS.numel()
            assert found.gram_II is not None
            torch.testing.assert_close(found.gram_II, x_RI.T @ x_RI, atol=1e-3, rtol=1e-4)
        before = runner.hidden_NSH.clone()
        influence = BlockInfluence(num_layers=3)
        runner.advance(block, influence)
        cosine = torch.nn.functional.cosine_similarity(before, runner.hidden_NSH, dim=-1).mean()
        others = [layer for layer in range(3) if layer != index]
        for layer in others:
            influence.add(layer, torch.ones(1, 2), torch.ones(1, 2))
        assert influence.influence()[index] == pytest.approx(1 - float(cosine), abs=1e-5)


def test_wanda_prunes_each_block_by_inputs_of_the_pruned_blocks_before(
    source: Path, tmp_path: Path
) -> None:
    """Reference: the whole model in transformers, pruned block by block with a full forward pass each time."""
    run(source, tmp_path / "pruned", [{"wanda": {"sparsity": 0.5}}])
    model = load_model(source, dtype=torch.float32)
    ids_NS = calibration_tokens().ids_NS
    for layer in model.model.layers:
        modules = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        norms: dict[torch.nn.Module, Tensor] = {}
        handles = [
            m.register_forward_pre_hook(
                lambda m, a, norms=norms: norms.update({m: a[0].flatten(0, 1).norm(dim=0)})
            )
            for m in modules
        ]
        with torch.no_grad():
            model(ids_NS)
        for handle in handles:
            handle.remove()
        for module in modules:
            module.weight.data *= keep_mask(module.weight.data.abs() * norms[module], 0.5)
    pruned = open_checkpoint(tmp_path / "pruned")
    for row in pruned.manifest.matrices:
        if ".layers." in row.name:
            expected = model.get_submodule(row.name).weight
            stored = pruned.tensor(f"{row.name}.weight")
            assert torch.equal(stored == 0, expected == 0), row.name
            assert row.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "stages", CALIBRATED, ids=lambda stages: "+".join(next(iter(s)) for s in stages)
)
def test_a_killed_run_resumes_to_the_same_bytes(
    source: Path, tmp_path: Path, stages: list[dict[str, Any]]
) -> None:
    whole = run(source, tmp_path / "whole", stages)
    assert verify_checkpoint(tmp_path / "whole").problems == ()
    steps = itertools.count()

    class KilledError(Exception):
        pass

    # every run dies a few steps further, as if killed: nothing of it is cleaned up
    for allowed in itertools.count(3, 9):
        budget = allowed

        def progress(done: int, total: int) -> None:
            nonlocal budget
            assert 0 <= done <= total
            next(steps)
            budget -= 1
            if budget < 0:
                raise KilledError

        try:
            resumed = run(
                source, tmp_path / "resumed", stages, work=tmp_path / "work", progress=progress
            )
        except KilledError:
            continue
        break
    assert checkpoint_hash(resumed) == checkpoint_hash(whole)
    assert resumed.stage_results == whole.stage_results
    assert torch.equal(logits(tmp_path / "resumed"), logits(tmp_path / "whole"))


def test_unfinished_work_of_another_recipe_is_not_used(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "first", [{"magnitude": {"sparsity": 0.5}}], work=tmp_path / "work")
    again = run(source, tmp_path / "b", [{"magnitude": {"sparsity": 0.2}}], work=tmp_path / "work")
    assert again.matrices[0].sparsity == pytest.approx(0.2, abs=0.001)
    with pytest.raises(CheckpointError, match="not empty"):
        run(source, tmp_path / "b", [{"magnitude": {"sparsity": 0.3}}])


def test_two_stages_are_two_recipes_of_one(source: Path, tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"welore": {"err": 0.4, "rank_multiple": 8}},
        {"int4": {"group_size": 32, "method": "gptq"}},
    ]
    together = run(source, tmp_path / "together", stages)
    run(source, tmp_path / "first", stages[:1])
    apart = run(tmp_path / "first", tmp_path / "second", stages[1:])
    assert checkpoint_hash(together) == checkpoint_hash(apart)
    assert together.recipe == apart.recipe == parse_recipe(stages).to_json()
    assert together.ratios["effective_rank_reduction"] == pytest.approx(0.4, abs=0.05)


def test_low_rank_layers_are_the_truncated_svd_and_keep_their_bias(
    source: Path, tmp_path: Path
) -> None:
    stages: list[dict[str, Any]] = [{"welore": {"err": 0.5, "rank_multiple": 8}}]
    manifest = run(source, tmp_path / "low", stages)
    low, before = open_checkpoint(tmp_path / "low"), open_checkpoint(source)
    ranks = manifest.stage_results[0]["welore"]["ranks"]
    factored = [row for row in manifest.matrices if isinstance(row.linear, LowRankLinear)]
    assert len(factored) > 3
    assert any(row.linear.bias for row in factored)
    for row in manifest.matrices:
        if row in factored:
            assert isinstance(row.linear, LowRankLinear)
            assert row.linear.rank == ranks[row.name]
            assert row.parameters < before.manifest.matrices[0].linear.parameters * 10
            u_OK, v_KI = low.tensor(f"{row.name}.weight_u"), low.tensor(f"{row.name}.weight_v")
            u, s, vh = torch.linalg.svd(before.tensor(f"{row.name}.weight"), full_matrices=False)
            expected = (u[:, : row.linear.rank] * s[: row.linear.rank]) @ vh[: row.linear.rank]
            torch.testing.assert_close(u_OK @ v_KI, expected, atol=1e-4, rtol=1e-4)
        elif ".layers." in row.name:
            assert row.dense_reason is not None
        if row.linear.bias:
            assert torch.equal(low.tensor(f"{row.name}.bias"), before.tensor(f"{row.name}.bias"))
    sizes = {n: min(m.linear.out_features, m.linear.in_features) for m in manifest.matrices
             if (n := m.name) in ranks}  # fmt: skip
    achieved = 1 - sum(ranks.values()) / sum(sizes.values())
    assert manifest.ratios["effective_rank_reduction"] == pytest.approx(achieved)
    assert manifest.ratios["parameters"] < 1


def test_cut_matrices_that_factors_would_not_shrink_are_stored_whole(
    source: Path, tmp_path: Path
) -> None:
    stages: list[dict[str, Any]] = [
        {"welore": {"err": 0.1, "count": "all", "allocation": "uniform", "rank_multiple": 8}}
    ]
    manifest = run(source, tmp_path / "cut", stages)
    row = next(row for row in manifest.matrices if row.name.endswith("q_proj"))
    assert row.linear.kind == "dense"
    assert "rank 56 of 64" in (row.dense_reason or "")
    cut = open_checkpoint(tmp_path / "cut").tensor(f"{row.name}.weight")
    assert int(torch.linalg.matrix_rank(cut, tol=1e-3)) == 56
    assert manifest.ratios["parameters"] <= 1


def test_int4_factors_are_calibrated_in_sequence(source: Path, tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"welore": {"err": 0.5, "rank_multiple": 32, "count": "all", "allocation": "uniform"}},
        {"int4": {"group_size": 32, "method": "gptq"}},
    ]
    manifest = run(source, tmp_path / "both", stages)
    name = "model.layers.0.mlp.gate_proj"
    row = next(row for row in manifest.matrices if row.name == name)
    assert isinstance(row.linear, LowRankLinear)
    assert (row.linear.weight_u.kind, row.linear.weight_v.kind) == ("int4", "int4")
    # by hand: weight_v sees the inputs of block 0's FFN, weight_u what the quantized weight_v makes of them
    run(source, tmp_path / "low", stages[:1])
    low = open_checkpoint(tmp_path / "low")
    u_OK, v_KI = (low.tensor(f"{name}.weight_{factor}").float() for factor in "uv")
    runner = BlockRunner(tmp_path / "low", low, calibration_tokens().ids_NS)
    found = runner.statistics(load_block(low, list_blocks(low)[0]), gram=True)["mlp.gate_proj"]
    assert found.gram_II is not None
    options: dict[str, Any] = {"symmetric": True, "scale_dtype": torch.float32}
    v_KI = dequantize(gptq(v_KI, found.gram_II, 32, **options))
    u_OK = dequantize(gptq(u_OK, v_KI @ found.gram_II @ v_KI.T, 32, **options))
    layer = load_model(tmp_path / "both", dtype=torch.float32).get_submodule(name)
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), x @ (u_OK @ v_KI).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("low_rank", [False, True])
def test_scales_of_awq_are_folded_without_a_trace(
    source: Path, tmp_path: Path, low_rank: bool
) -> None:
    """Before any rounding a block with scales gives what it gave without them."""
    if low_rank:
        options = {"err": 0.3, "count": "all", "allocation": "uniform", "rank_multiple": 8}
        run(source, tmp_path / "low", [{"welore": options}])
        source = tmp_path / "low"
    checkpoint = open_checkpoint(source)
    runner = BlockRunner(source, checkpoint, calibration_tokens().ids_NS)
    num_changed = 0
    for names in list_blocks(checkpoint):
        block, scaled = load_block(checkpoint, names), load_block(checkpoint, names)
        statistics = runner.statistics(block, gram=True)
        start = runner.hidden_NSH.clone()
        fold_awq_scales(Int4(method="awq", group_size=32), scaled, statistics, head_dim=16)
        for name, linear in scaled.linears.items():
            num_changed += not torch.equal(linear.weight, block.linears[name].weight)
        runner.advance(scaled)
        with_scales = runner.hidden_NSH.clone()
        runner.hidden_NSH = start
        runner.advance(block)
        torch.testing.assert_close(with_scales, runner.hidden_NSH, atol=1e-3, rtol=1e-4)
    assert num_changed > 6


def test_removed_neurons_and_blocks_are_gone_for_transformers_too(
    source: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    stages: list[dict[str, Any]] = [{"shortgpt": {"remove": 1}}, {"structured": {"ffn_width": 64}}]
    manifest = run(source, tmp_path / "small", stages)
    config = read_config(tmp_path / "small")
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 64)
    removed = manifest.stage_results[0]["shortgpt"]["remove"]
    kept = [index for index in range(3) if index not in removed]
    before = load_model(source, dtype=torch.float32)
    layers = [before.model.layers[index] for index in kept]
    after, plain = load_model(tmp_path / "small", dtype=torch.float32), None
    for old, new in zip(layers, after.model.layers, strict=True):
        assert torch.equal(old.self_attn.q_proj.weight, new.self_attn.q_proj.weight)
        rows = [r.tolist() for r in old.mlp.up_proj.weight]
        chosen = [rows.index(r.tolist()) for r in new.mlp.up_proj.weight]
        assert chosen == sorted(chosen)
        assert torch.equal(old.mlp.gate_proj.weight[chosen], new.mlp.gate_proj.weight)
        assert torch.equal(old.mlp.down_proj.weight[:, chosen], new.mlp.down_proj.weight)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, logits(tmp_path / "small"))


@pytest.mark.parametrize(("groups", "per_group"), [(1, None), (None, 1), (1, 1)])
def test_removed_heads_are_the_least_active_and_gone_for_transformers_too(
    source: Path, tmp_path: Path, groups: int | None, per_group: int | None
) -> None:
    """Reference: Minitron's statistic from transformers' own o_proj inputs, heads ranked by hand."""
    from transformers import AutoModelForCausalLM

    options = {"num_key_value_heads": groups, "heads_per_group": per_group}
    stages = [{"structured": {name: n for name, n in options.items() if n is not None}}]
    run(source, tmp_path / "small", stages)
    config = read_config(tmp_path / "small")
    keep_groups, keep_heads = groups or 2, per_group or 2
    assert config["num_key_value_heads"] == keep_groups
    assert config["num_attention_heads"] == keep_groups * keep_heads
    assert config["head_dim"] == 16
    model = load_model(source, dtype=torch.float32)
    inputs: list[Tensor] = []
    first = model.model.layers[0].self_attn
    first.o_proj.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model(calibration_tokens().ids_NS)
    activation_I = inputs[0].abs().mean(dim=1).norm(dim=0)
    importance_GQ = activation_I.reshape(4, 16).norm(dim=1).reshape(2, 2)
    kept = [
        [int(q) for q in row.argsort(descending=True)[:keep_heads].sort().values]
        for row in importance_GQ
    ]
    sums = [sum(float(importance_GQ[g, q]) for q in kept[g]) for g in range(2)]
    chosen = sorted(sorted(range(2), key=lambda g: -sums[g])[:keep_groups])
    heads = [2 * g + q for g in chosen for q in kept[g]]

    def rows(indices: list[int]) -> Tensor:
        return torch.cat([torch.arange(16 * index, 16 * index + 16) for index in indices])

    small = load_model(tmp_path / "small", dtype=torch.float32)
    attention = small.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, first.q_proj.weight[rows(heads)])
    assert torch.equal(attention.q_proj.bias, first.q_proj.bias[rows(heads)])
    assert torch.equal(attention.v_proj.weight, first.v_proj.weight[rows(chosen)])
    assert torch.equal(attention.k_proj.bias, first.k_proj.bias[rows(chosen)])
    assert torch.equal(attention.o_proj.weight, first.o_proj.weight[:, rows(heads)])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, logits(tmp_path / "small"))


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_owl_makes_blocks_with_fewer_outliers_sparser(
    source: Path, tmp_path: Path, method: str
) -> None:
    """Reference: shares of outliers from transformers' own inputs of the dense model."""
    stages = [{method: {"sparsity": 0.5, "allocation": "owl"}}]
    manifest = run(source, tmp_path / "pruned", stages)
    plan = manifest.stage_results[0][method]
    model = load_model(source, dtype=torch.float32)
    scores: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda m, a, name=name: scores.update(
                    {name: m.weight.abs() * a[0].flatten(0, 1).norm(dim=0)}
                )
            )
    with torch.no_grad():
        model(calibration_tokens().ids_NS)
    for block, (share, sparsity) in enumerate(
        zip(plan["outlier_share"], plan["sparsity"], strict=True)
    ):
        prefix = f"model.layers.{block}."
        flat = torch.cat([s.flatten() for name, s in scores.items() if name.startswith(prefix)])
        assert share == pytest.approx(float((flat > 5 * flat.mean()).double().mean()), abs=1e-4)
        for row in manifest.matrices:
            if row.name.startswith(prefix):
                assert row.sparsity == pytest.approx(sparsity, abs=0.01)
    assert sum(plan["sparsity"]) / 3 == pytest.approx(0.5)
    assert len(set(plan["sparsity"])) > 1


def test_owl_gives_ranks_by_block_without_whitening(source: Path, tmp_path: Path) -> None:
    options = {"err": 0.4, "count": "all", "allocation": "owl", "rank_multiple": 8}
    manifest = run(source, tmp_path / "low", [{"welore": options}])
    ranks = manifest.stage_results[0]["welore"]["ranks"]
    shares = [
        {ranks[f"model.layers.{block}.{name}"] for name in ("mlp.up_proj", "self_attn.q_proj")}
        for block in range(3)
    ]
    assert all(len(share) == 1 for share in shares)  # both are of rank 64
    assert len({min(share) for share in shares}) > 1
    assert manifest.ratios["effective_rank_reduction"] == pytest.approx(0.4, abs=0.06)
    name = "model.layers.0.mlp.up_proj"
    low = open_checkpoint(tmp_path / "low")
    weight_OI = open_checkpoint(source).tensor(f"{name}.weight")
    u, s, vh = torch.linalg.svd(weight_OI, full_matrices=False)
    rank = ranks[name]
    found = low.linear_tensors(next(row for row in manifest.matrices if row.name == name))
    product = found["weight_u"] @ found["weight_v"] if "weight_u" in found else found["weight"]
    torch.testing.assert_close(product, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 0.25])
def test_flap_cuts_unequally_and_biases_stand_in_for_what_went(
    source: Path, tmp_path: Path, sparsity: float
) -> None:
    """Reference: masks on transformers' own modules instead of slices, and the formula of the compensation."""
    manifest = run(source, tmp_path / "small", [{"flap": {"sparsity": sparsity}}])
    plan = manifest.stage_results[0]["flap"]
    shapes = plan["layer_shapes"]
    assert read_config(tmp_path / "small")["layer_shapes"] == shapes
    assert len({tuple(shape.values()) for shape in shapes}) > 1
    assert plan["sparsity"] == pytest.approx(sparsity, abs=0.06)
    before, after = open_checkpoint(source).manifest, manifest
    weights = [
        sum(m.linear.out_features * m.linear.in_features for m in found.matrices)
        for found in (before, after)
    ]
    assert plan["sparsity"] == pytest.approx(1 - weights[1] / weights[0])
    model = load_model(source, dtype=torch.float32)
    ids_NS = calibration_tokens().ids_NS
    for layer, shape in zip(model.model.layers, shapes, strict=True):
        inputs: dict[str, Tensor] = {}
        outputs = {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}
        handles = [
            module.register_forward_pre_hook(
                lambda _, a, name=name, inputs=inputs: inputs.update({name: a[0].flatten(0, 1)})
            )
            for name, module in outputs.items()
        ]
        with torch.no_grad():
            model(ids_NS)
        for handle in handles:
            handle.remove()
        for name, module in outputs.items():
            x_RI = inputs[name]
            score_I = x_RI.var(dim=0) * module.weight.square().sum(dim=0)
            if name == "down":
                keep = score_I.topk(shape["intermediate_size"]).indices
            else:
                groups = score_I.reshape(2, 32).mean(dim=1).topk(shape["num_key_value_heads"])
                keep = torch.cat(
                    [torch.arange(32 * g, 32 * g + 32) for g in groups.indices.tolist()]
                )
            gone_I = torch.ones(len(score_I), dtype=torch.bool).index_fill_(0, keep, False)
            bias_O = module.weight[:, gone_I] @ x_RI.mean(dim=0)[gone_I]
            module.bias = torch.nn.Parameter(bias_O, requires_grad=False)
            module.weight[:, gone_I] = 0
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(logits(tmp_path / "small"), expected, atol=1e-3, rtol=1e-3)


def test_the_blocks_that_change_least_are_removed(tmp_path: Path) -> None:
    model = tiny_decoder(num_hidden_layers=4)
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # block 2 does nothing
        model.model.layers[2].get_submodule(name).weight.data.zero_()
    source = save_and_import(model, tmp_path / "hf", tmp_path / "models")
    manifest = run(source, tmp_path / "short", [{"shortgpt": {"remove": 1}}])
    result = manifest.stage_results[0]["shortgpt"]
    assert result["remove"] == [2]
    assert result["influence"][2] == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(logits(tmp_path / "short"), logits(source))


def test_what_a_model_has_not_cannot_be_removed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="3 blocks"):
        run(source, tmp_path / "a", [{"shortgpt": {"remove": 3}}])
    with pytest.raises(StageError, match="192 neurons"):
        run(source, tmp_path / "b", [{"structured": {"ffn_width": 192}}])


def test_what_was_compressed_is_not_compressed_in_a_wrong_order(
    source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "int4", [{"int4": {"group_size": 32}}])
    with pytest.raises(CheckpointError, match="welore cannot follow int4"):
        compress(
            tmp_path / "int4",
            tmp_path / "again",
            parse_recipe([{"welore": {"err": 0.3}}]),
            source_id="tiny",
        )


def test_weights_and_activations_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_decoder()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[0, 0] = torch.nan
    bad = save_and_import(model, tmp_path / "hf", tmp_path / "models")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj .* not finite"):
        run(bad, tmp_path / "a", [{"int4": {"group_size": 32}}])
    weight.data[0, 0] = 3e38
    bad = save_and_import(model, tmp_path / "hf2", tmp_path / "models2")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj: activations"):
        run(bad, tmp_path / "b", [{"wanda": {"sparsity": 0.5}}])


def test_calibration_samples_are_seeded_and_from_the_second_half() -> None:
    settings = Calibration(corpus="numbers", samples=200, length=7, seed=3)
    found = sample_tokens(list(range(41)), settings, sha256="c")
    assert found.ids_NS.shape == (200, 7)
    assert torch.equal(found.ids_NS.diff(dim=1), torch.ones(200, 6, dtype=torch.int64))
    assert (int(found.ids_NS.min()), int(found.ids_NS.max())) == (20, 40)
    again = sample_tokens(list(range(41)), settings, sha256="c")
    assert again.provenance == found.provenance
    with pytest.raises(CalibrationError, match="21 tokens in its second half, one sample needs 22"):
        sample_tokens(list(range(41)), Calibration(corpus="numbers", length=22), sha256="c")


def test_calibration_samples_of_a_file_are_from_anywhere_in_it() -> None:
    settings = Calibration(file="file-1", samples=200, length=7, seed=3)
    found = sample_tokens(list(range(41)), settings, sha256="f")
    assert (int(found.ids_NS.min()), int(found.ids_NS.max())) == (0, 40)
    tokens_sha256 = found.provenance.pop("tokens_sha256")
    assert len(tokens_sha256) == 64
    assert found.provenance == {
        "file": "file-1", "file_sha256": "f", "part": "whole", "samples": 200, "length": 7, "seed": 3
    }  # fmt: skip
    with pytest.raises(CalibrationError, match="file-1 has 41 tokens in its whole"):
        sample_tokens(list(range(41)), Calibration(file="file-1", length=42), sha256="f")


def test_unknown_architectures_and_samples_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(source)
    with pytest.raises(CalibrationError, match="samples of 65 tokens, the model takes 64"):
        BlockRunner(source, checkpoint, torch.zeros(1, 65, dtype=torch.int64))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CalibrationError, match="gpt2"):
        BlockRunner(tmp_path, checkpoint, torch.zeros(1, 4, dtype=torch.int64))


def test_singular_values_are_cached_by_weight(source: Path, tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [{"welore": {"err": 0.4, "rank_multiple": 8}}]
    first = run(source, tmp_path / "a", stages, cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 21
    stamps = [path.stat().st_mtime_ns for path in files]
    second = run(source, tmp_path / "b", stages, cache=tmp_path / "cache")
    assert [path.stat().st_mtime_ns for path in files] == stamps
    assert checkpoint_hash(first) == checkpoint_hash(second)


def test_whitened_ranks_come_from_the_inputs(source: Path, tmp_path: Path) -> None:
    """The error on calibration inputs of a block is smaller than the plain SVD's at the same ranks."""
    options = {"err": 0.5, "count": "all", "allocation": "uniform", "rank_multiple": 8}
    run(source, tmp_path / "plain", [{"welore": options}])
    run(source, tmp_path / "white", [{"welore": options | {"calibration": "activation"}}])
    checkpoint = open_checkpoint(source)
    runner = BlockRunner(source, checkpoint, calibration_tokens().ids_NS)
    block = load_block(checkpoint, list_blocks(checkpoint)[0])
    gram_II = runner.statistics(block, gram=True)["self_attn.q_proj"].gram_II
    assert gram_II is not None
    weight = block.linears["self_attn.q_proj"].weight

    def error(folder: Path) -> float:
        opened = open_checkpoint(folder)
        name = "model.layers.0.self_attn.q_proj.weight"
        rows = opened.manifest.matrices
        row = next(r for r in rows if r.name == name.removesuffix(".weight"))
        if isinstance(row.linear, LowRankLinear):
            stored = opened.tensor(f"{name}_u") @ opened.tensor(f"{name}_v")
        else:
            stored = opened.tensor(name)
        difference = (stored - weight).double()
        return float((difference @ gram_II.double() @ difference.T).trace())

    assert error(tmp_path / "white") < error(tmp_path / "plain")
    u_OK, v_KI = factor(weight, spectrum(weight, gram_II).basis_OR, 32)
    difference = (u_OK @ v_KI - weight).double()
    expected = float((difference @ gram_II.double() @ difference.T).trace())
    assert error(tmp_path / "white") == pytest.approx(expected, rel=1e-3)
