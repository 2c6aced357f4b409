"""What each stage of a recipe does: a plan for the whole model where it needs one, then a change to each block.

The mathematics is elsewhere, as pure functions over tensors; here they meet the names of a decoder block's layers.

Shapes: O output channels, I input channels, K rank, F neurons of a feed-forward block.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy
import torch
from torch import Tensor

from compression.block import Block, BlockNames, Linear, load_block
from compression.calibration import BlockRunner, require_gram
from compression.checkpoint import LAYER_SHAPES, Checkpoint, LayerShape
from compression.low_rank.factors import break_even_rank, factor, singular_values, spectrum
from compression.low_rank.ranks import RankChoice, allotted_ranks, choose_ranks, uniform_ranks
from compression.pruning.flap import bias_compensation, fluctuation_score, select_units
from compression.pruning.magnitude import magnitude_keep_mask
from compression.pruning.masks import NM, Sparsity
from compression.pruning.owl import block_patterns, block_sparsities, outlier_share
from compression.pruning.shortgpt import BlockInfluence, select_layers
from compression.pruning.sparsegpt import sparsegpt
from compression.pruning.structured import (
    AttentionSlice,
    ffn_width,
    head_importance,
    select_heads,
    select_neurons,
)
from compression.pruning.wanda import wanda_keep_mask
from compression.quantization.awq import divide_outputs, search_scale, value_sources
from compression.quantization.gptq import gptq
from compression.quantization.int4 import QuantizedWeight, dequantize, round_to_nearest
from compression.quantization.int8 import round_to_nearest_int8
from compression.quantization.ranges import round_in_best_range
from compression.recipe import (
    GROUP_SIZES,
    Flap,
    Int4,
    Int8,
    Magnitude,
    ShortGpt,
    SparseGpt,
    Stage,
    Structured,
    Wanda,
    WeLore,
)
from compression.statistics import InputStatistics

JsonObject = dict[str, Any]
SPECTRA_NAME = "spectra.npz"


class _Settings(TypedDict):
    symmetric: bool
    scale_dtype: torch.dtype


class StageError(Exception):
    """A stage that this model cannot go through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a plan for the whole model may look at.

    Attributes:
        new_runner: starts calibration at the first block; None without calibration text.
        cache: folder of singular values by weight hash; None for none.
        work: the stage's own folder, for what a report shows.
        check: called between matrices; may raise to stop.
        head_dim: channels of an attention head.
    """

    checkpoint: Checkpoint
    blocks: list[BlockNames]
    new_runner: Callable[[], BlockRunner] | None
    cache: Path | None
    work: Path
    check: Callable[[], None]
    head_dim: int


def plan_stage(stage: Stage, context: StageContext) -> JsonObject:
    """Decide what takes the whole model to decide.

    Raises:
        StageError: the model has not what the stage is to remove.
    """
    match stage:
        case WeLore():
            return _plan_welore(stage, context)
        case ShortGpt():
            return _plan_shortgpt(stage, context)
        case Structured():
            return _plan_structured(stage, context)
        case Flap():
            return _plan_flap(stage, context)
        case Magnitude() | Wanda() | SparseGpt():
            return _plan_sparsity(stage, context)
        case Int4() | Int8():
            return {}


def needs_statistics(stage: Stage) -> bool:
    """Whether `apply_stage` looks at inputs; other calibrated stages see all they need when they plan."""
    match stage:
        case WeLore():
            return stage.calibration == "activation"
        case ShortGpt() | Magnitude():
            return False
        case _:
            return stage.calibrated


def needs_gram(stage: Stage) -> bool:
    """Whether the stage needs Gram matrices of the inputs, which are most of calibration's work."""
    return isinstance(stage, SparseGpt | WeLore | Int4)


def apply_stage(
    stage: Stage,
    block: Block,
    plan: JsonObject,
    statistics: Mapping[str, InputStatistics],
    *,
    head_dim: int,
) -> None:
    """Change one block in place.

    Args:
        head_dim: channels of an attention head.
        statistics: of every linear layer's input; empty where `needs_statistics` says that nobody asks.
    """
    match stage:
        case WeLore():
            _apply_welore(block, plan, statistics)
        case Structured():
            _apply_structured(stage, block, plan, statistics, head_dim)
        case Flap():
            _apply_flap(block, plan, statistics, head_dim)
        case Magnitude() | Wanda() | SparseGpt():
            _apply_sparsity(stage, block, plan, statistics)
        case Int4():
            scales: Mapping[str, Tensor] = {}
            if stage.method == "awq":
                scales = fold_awq_scales(stage, block, statistics, head_dim)
            _apply_int4(stage, block, statistics, scales)
        case Int8():
            _apply_int8(block)
        case ShortGpt():
            pass  # blocks that stay are not changed


# --- ShortGPT ---


def _plan_shortgpt(stage: ShortGpt, context: StageContext) -> JsonObject:
    if stage.remove >= len(context.blocks):
        raise StageError(
            f"shortgpt.remove is {stage.remove}, the model has {len(context.blocks)} blocks"
        )
    assert context.new_runner is not None
    runner = context.new_runner()
    measured = BlockInfluence(num_layers=len(context.blocks))
    for names in context.blocks:
        runner.advance(load_block(context.checkpoint, names), measured)
    influence = measured.influence()
    return {"influence": influence, "remove": sorted(select_layers(influence, stage.remove))}


# --- structured: neurons and heads ---

_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
"""What a plan that cuts heads everywhere alike says; fields of config.json."""


def _shape(stage: Structured | Flap, names: BlockNames, head_dim: int) -> LayerShape:
    """Raises: StageError: the block is none of the Llama family."""
    rows = {row.name.removeprefix(f"{names.prefix}."): row.linear for row in names.rows}
    missing = [name for name in (*_ATTENTION, *_FFN) if name not in rows]
    if missing:
        raise StageError(f"{stage.name}: {names.prefix} has no {missing[0]}")
    return LayerShape(
        intermediate_size=rows["mlp.down_proj"].in_features,
        num_attention_heads=rows["self_attn.q_proj"].out_features // head_dim,
        num_key_value_heads=rows["self_attn.k_proj"].out_features // head_dim,
    )


def _plan_structured(stage: Structured, context: StageContext) -> JsonObject:
    shapes = {_shape(stage, names, context.head_dim) for names in context.blocks}
    if len(shapes) > 1:
        raise StageError("structured cuts blocks of equal shape, this model's differ")
    (shape,) = shapes
    plan: JsonObject = {}
    if stage.ffn_width is not None:
        if stage.ffn_width >= shape.intermediate_size:
            raise StageError(
                f"structured.ffn_width is {stage.ffn_width}, every block has {shape.intermediate_size} neurons"
            )
        plan["intermediate_size"] = stage.ffn_width
    if stage.cuts_heads:
        groups, per_group = shape.num_key_value_heads, shape.heads_per_group
        keep_groups = stage.num_key_value_heads or groups
        keep_heads = stage.heads_per_group or per_group
        if (
            keep_groups > groups
            or keep_heads > per_group
            or (keep_groups == groups and keep_heads == per_group)
        ):
            raise StageError(
                f"structured is to keep {keep_groups} key-value heads of {keep_heads} query heads, every block has"
                f" {groups} of {per_group}"
            )
        plan |= {
            "num_attention_heads": keep_groups * keep_heads,
            "num_key_value_heads": keep_groups,
            "head_dim": context.head_dim,
        }
    return plan


def _apply_structured(
    stage: Structured,
    block: Block,
    plan: JsonObject,
    statistics: Mapping[str, InputStatistics],
    head_dim: int,
) -> None:
    if stage.ffn_width is not None:
        _cut_neurons(block, select_neurons(statistics["mlp.down_proj"].activation, stage.ffn_width))
    if stage.cuts_heads:
        num_heads = len(block.linears["self_attn.q_proj"].weight) // head_dim
        importance_H = head_importance(
            statistics["self_attn.o_proj"].activation, num_heads, reduction="norm"
        )
        keep_groups = plan["num_key_value_heads"]
        kept = select_heads(
            importance_H,
            num_key_value_heads=len(block.linears["self_attn.k_proj"].weight) // head_dim,
            head_dim=head_dim,
            keep_groups=keep_groups,
            keep_heads_per_group=plan["num_attention_heads"] // keep_groups,
        )
        _cut_heads(block, kept)


def _cut_neurons(block: Block, keep_F: Tensor) -> None:
    gate, up, down = (block.linears[name] for name in _FFN)
    _keep_rows(gate, keep_F)
    _keep_rows(up, keep_F)
    down.factors = (down.weight[:, keep_F].contiguous(),)


def _cut_heads(block: Block, kept: AttentionSlice) -> None:
    query, key, value, output = (block.linears[name] for name in _ATTENTION)
    _keep_rows(query, kept.query_rows)
    _keep_rows(key, kept.key_value_rows)
    _keep_rows(value, kept.key_value_rows)
    output.factors = (output.weight[:, kept.query_rows].contiguous(),)


def _keep_rows(linear: Linear, rows: Tensor) -> None:
    linear.factors = (linear.weight[rows].contiguous(),)
    if linear.bias_O is not None:
        linear.bias_O = linear.bias_O[rows].contiguous()


# --- FLAP: the same, where it hurts least ---


def _plan_flap(stage: Flap, context: StageContext) -> JsonObject:
    """How much of each block goes; which of its neurons and groups is decided on the inputs that it then has."""
    assert context.new_runner is not None
    runner = context.new_runner()
    shapes = [_shape(stage, names, context.head_dim) for names in context.blocks]
    scores: list[Tensor] = []
    prices: list[int] = []
    for names, shape in zip(context.blocks, shapes, strict=True):
        block = load_block(context.checkpoint, names)
        statistics = runner.statistics(block, gram=False, advance=True)
        scores += [_fluctuation(block, statistics, "mlp.down_proj")]
        scores += [_group_fluctuation(block, statistics, shape.num_key_value_heads)]
        hidden = len(block.linears["mlp.down_proj"].weight)
        prices += [3 * hidden, 2 * (shape.heads_per_group + 1) * context.head_dim * hidden]
    kept = select_units(scores, prices, stage.sparsity)
    after = [
        LayerShape(
            intermediate_size=ffn_width(
                shape.intermediate_size, 1 - len(neurons) / shape.intermediate_size
            ),
            num_attention_heads=len(groups) * shape.heads_per_group,
            num_key_value_heads=len(groups),
        )
        for shape, neurons, groups in zip(shapes, kept[::2], kept[1::2], strict=True)
    ]

    def weights(sizes: list[LayerShape]) -> int:
        units = [n for s in sizes for n in (s.intermediate_size, s.num_key_value_heads)]
        return sum(count * price for count, price in zip(units, prices, strict=True))

    return {
        LAYER_SHAPES: [asdict(shape) for shape in after],
        "sparsity": 1 - weights(after) / weights(shapes),
    }


def _fluctuation(block: Block, statistics: Mapping[str, InputStatistics], name: str) -> Tensor:
    return fluctuation_score(block.linears[name].weight, statistics[name].variance)


def _group_fluctuation(
    block: Block, statistics: Mapping[str, InputStatistics], num_groups: int
) -> Tensor:
    score_I = _fluctuation(block, statistics, "self_attn.o_proj")
    return head_importance(score_I, num_groups, reduction="mean")


def _apply_flap(
    block: Block, plan: JsonObject, statistics: Mapping[str, InputStatistics], head_dim: int
) -> None:
    shape = LayerShape(**plan[LAYER_SHAPES][block.index])
    keep_F = select_neurons(
        _fluctuation(block, statistics, "mlp.down_proj"), shape.intermediate_size
    )
    num_groups = len(block.linears["self_attn.k_proj"].weight) // head_dim
    group_G = _group_fluctuation(block, statistics, num_groups)
    kept = select_heads(
        group_G.repeat_interleave(shape.heads_per_group),
        num_key_value_heads=num_groups,
        head_dim=head_dim,
        keep_groups=shape.num_key_value_heads,
        keep_heads_per_group=shape.heads_per_group,
    )
    _compensate(block.linears["mlp.down_proj"], statistics["mlp.down_proj"], keep_F)
    _compensate(block.linears["self_attn.o_proj"], statistics["self_attn.o_proj"], kept.query_rows)
    _cut_neurons(block, keep_F)
    _cut_heads(block, kept)


def _compensate(linear: Linear, inputs: InputStatistics, keep_K: Tensor) -> None:
    if len(keep_K) == inputs.num_channels:
        return
    bias_O = bias_compensation(linear.weight, inputs.mean_I, keep_K)
    linear.bias_O = bias_O if linear.bias_O is None else linear.bias_O + bias_O


# --- WeLore ---


def _plan_welore(stage: WeLore, context: StageContext) -> JsonObject:
    spectra: dict[str, Tensor] = {}
    whitens = stage.calibration == "activation"
    outliers = _Outliers()
    runner = None
    if stage.calibrated:
        assert context.new_runner is not None
        runner = context.new_runner()
    for names in context.blocks:
        block = load_block(context.checkpoint, names)
        statistics = {} if runner is None else runner.statistics(block, gram=whitens, advance=True)
        if stage.allocation == "owl":
            outliers.add(block, statistics)
        for name, linear in block.dense_linears():
            context.check()
            if whitens:
                gram_II = require_gram(statistics, name)
                spectra[linear.name] = singular_values(linear.weight, gram_II)
            else:
                spectra[linear.name] = _cached_singular_values(linear.weight, context.cache)
    choice = _choose(stage, spectra, outliers)
    numpy.savez(context.work / SPECTRA_NAME, **{n: s.numpy() for n, s in spectra.items()})  # type: ignore[arg-type]
    return {
        "threshold": choice.threshold,
        "effective_rank_reduction": choice.err,
        "ranks": choice.ranks,
        "low_rank_components": sorted(choice.lrc),
    }


def _choose(stage: WeLore, spectra: Mapping[str, Tensor], outliers: "_Outliers") -> RankChoice:
    sizes = {name: values.numel() for name, values in spectra.items()}
    if stage.allocation == "uniform":
        return uniform_ranks(sizes, stage.err, multiple=stage.rank_multiple)
    if stage.allocation == "owl":
        errs = {
            name: err
            for names, err in zip(outliers.names, outliers.sparsities(stage.err), strict=True)
            for name in names
        }
        return allotted_ranks(sizes, errs, multiple=stage.rank_multiple)
    try:
        return choose_ranks(spectra, stage.err, count=stage.count, multiple=stage.rank_multiple)
    except ValueError as error:
        raise StageError(f"welore: {error}") from None


def _cached_singular_values(weight_OI: Tensor, cache: Path | None) -> Tensor:
    if cache is None:
        return singular_values(weight_OI)
    digest = hashlib.sha256(str(tuple(weight_OI.shape)).encode())
    digest.update(weight_OI.contiguous().numpy().tobytes())
    path = cache / f"{digest.hexdigest()}.npy"
    if path.is_file():
        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    values_R = singular_values(weight_OI)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    numpy.save(temporary, values_R.numpy())
    temporary.replace(path)
    return values_R


def _apply_welore(
    block: Block, plan: JsonObject, statistics: Mapping[str, InputStatistics]
) -> None:
    for name, linear in block.dense_linears():
        weight_OI = linear.weight
        full, rank = min(weight_OI.shape), plan["ranks"][linear.name]
        if rank == full:
            linear.dense_reason = f"no low-rank component: keeps its rank of {full}"
            continue
        gram_II = require_gram(statistics, name) if statistics else None
        u_OK, v_KI = factor(weight_OI, spectrum(weight_OI, gram_II).basis_OR, rank)
        if rank < break_even_rank(*weight_OI.shape):
            linear.factors = (u_OK, v_KI)
        else:
            linear.factors = (u_OK @ v_KI,)
            linear.dense_reason = f"cut to rank {rank} of {full}, stored as one matrix: two factors would be no smaller"


# --- sparsity ---


class _Outliers:
    """OWL's shares of outliers, block by block.

    Attributes:
        names: of each block's matrices.
    """

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.shares: list[float] = []
        self._num_weights: list[int] = []

    def add(self, block: Block, statistics: Mapping[str, InputStatistics]) -> None:
        """Raises: StageError: the block has no matrix left, or values that are not finite."""
        linears = dict(block.dense_linears())
        if not linears:
            raise StageError(f"owl: {block.prefix} has no dense matrix")
        weights = [linear.weight for linear in linears.values()]
        try:
            share = outlier_share(weights, [statistics[name].norm for name in linears])
        except ValueError as error:
            raise StageError(f"owl: {block.prefix}: {error}") from error
        self.shares.append(share)
        self.names.append([linear.name for linear in linears.values()])
        self._num_weights.append(sum(weight_OI.numel() for weight_OI in weights))

    def sparsities(self, sparsity: float) -> list[float]:
        return block_sparsities(self.shares, self._num_weights, sparsity)


def _plan_sparsity(stage: Magnitude | Wanda | SparseGpt, context: StageContext) -> JsonObject:
    """Sparsity of every block, where they differ."""
    if stage.allocation == "uniform":
        return {}
    assert context.new_runner is not None
    runner = context.new_runner()
    outliers = _Outliers()
    for names in context.blocks:
        block = load_block(context.checkpoint, names)
        outliers.add(block, runner.statistics(block, gram=False, advance=True))
    sparsity = _parse_sparsity(stage.sparsity)
    chosen: list[float] | list[str]
    if isinstance(sparsity, NM):
        sparsities = outliers.sparsities(1 - sparsity.n / sparsity.m)
        chosen = [f"{n}:{sparsity.m}" for n in block_patterns(sparsities, sparsity.n, sparsity.m)]
    else:
        chosen = outliers.sparsities(sparsity)
    return {"sparsity": chosen, "outlier_share": outliers.shares}


def _apply_sparsity(
    stage: Magnitude | Wanda | SparseGpt,
    block: Block,
    plan: JsonObject,
    statistics: Mapping[str, InputStatistics],
) -> None:
    sparsity = _parse_sparsity(
        plan["sparsity"][block.index] if "sparsity" in plan else stage.sparsity
    )
    for linear in block.linears.values():
        if linear.is_low_rank:
            linear.dense_reason = "factors of a low-rank layer are not pruned"
    for name, linear in block.dense_linears():
        weight_OI = linear.weight
        if isinstance(sparsity, NM) and weight_OI.shape[1] % sparsity.m:
            linear.dense_reason = f"in_features {weight_OI.shape[1]} is no multiple of {sparsity.m}"
            continue
        match stage:
            case Magnitude():
                weight_OI = weight_OI * magnitude_keep_mask(weight_OI, sparsity)
            case Wanda():
                weight_OI = weight_OI * wanda_keep_mask(weight_OI, statistics[name].norm, sparsity)
            case SparseGpt():
                weight_OI = sparsegpt(weight_OI, require_gram(statistics, name), sparsity)
        linear.factors = (weight_OI,)
        linear.two_four = sparsity == NM(2, 4)
        linear.sparsity = float((weight_OI == 0).double().mean())


def _parse_sparsity(sparsity: float | str) -> Sparsity:
    if isinstance(sparsity, str):
        n, _, m = sparsity.partition(":")
        return NM(int(n), int(m))
    return sparsity


# --- INT4 ---


# What produces an input, and which layers read it.
_AWQ_INPUTS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


def fold_awq_scales(
    stage: Int4, block: Block, statistics: Mapping[str, InputStatistics], head_dim: int
) -> dict[str, Tensor]:
    """Multiply the inputs of what is to be rounded (W, or weight_v), divide the outputs of what comes before.

    Returns:
        What the inputs of each linear layer were multiplied with, (I,).
    """
    scales: dict[str, Tensor] = {}
    for producer, names in _AWQ_INPUTS:
        readers = [block.linears[name] for name in names]
        weights = [_float_factor(reader, -1) for reader in readers]
        num_channels = weights[0].shape[1]
        if num_channels % stage.group_size:
            continue  # stays dense, and says why, in `_apply_int4`
        source_I = None
        if producer == "self_attn.v_proj":
            num_key_value_heads = _float_factor(block.linears[producer], 0).shape[0] // head_dim
            source_I = value_sources(num_channels // head_dim, num_key_value_heads, head_dim)
        found = search_scale(
            weights,
            require_gram(statistics, names[0]),
            statistics[names[0]].mean_abs_I,
            stage.group_size,
            symmetric=stage.symmetric,
            scale_dtype=readers[0].scale_dtype,
            source_I=source_I,
        )
        for reader, weight_OI in zip(readers, weights, strict=True):
            reader.factors = (*reader.factors[:-1], weight_OI * found.scale_I)
        scales |= dict.fromkeys(names, found.scale_I)
        if producer in block.linears:
            linear = block.linears[producer]
            first = divide_outputs(_float_factor(linear, 0), found.scale_S)
            linear.factors = (first, *linear.factors[1:])
            if linear.bias_O is not None:
                linear.bias_O = divide_outputs(linear.bias_O, found.scale_S)
        else:
            norm = f"{producer}.weight"
            block.others[norm] = divide_outputs(block.others[norm], found.scale_S)
    return scales


def _float_factor(linear: Linear, index: int) -> Tensor:
    factor = linear.factors[index]
    assert isinstance(factor, Tensor)
    return factor


def _apply_int4(
    stage: Int4,
    block: Block,
    statistics: Mapping[str, InputStatistics],
    scales: Mapping[str, Tensor],
) -> None:
    for name, linear in block.linears.items():
        gram_II = require_gram(statistics, name) if stage.calibrated else None
        if gram_II is not None and name in scales:  # of the inputs as AWQ divides them
            gram_II = gram_II / scales[name][:, None] / scales[name]
        if linear.is_low_rank:
            _quantize_factors(stage, linear, gram_II)
            continue
        (weight_OI,) = linear.factors
        assert isinstance(weight_OI, Tensor)
        if weight_OI.shape[1] % stage.group_size:
            linear.dense_reason = (
                f"in_features {weight_OI.shape[1]} is no multiple of {stage.group_size}"
            )
            continue
        linear.factors = (_quantize(stage, weight_OI, stage.group_size, gram_II, linear),)
        linear.dense_reason = None


def _quantize_factors(stage: Int4, linear: Linear, gram_II: Tensor | None) -> None:
    """weight_v first; what it gives once quantized is what weight_u is calibrated with."""
    u_OK, v_KI = linear.factors
    assert isinstance(u_OK, Tensor)
    assert isinstance(v_KI, Tensor)
    sizes = [_group_size(stage, factor.shape[1]) for factor in (u_OK, v_KI)]
    group_u, group_v = sizes
    encoded: list[Tensor | QuantizedWeight] = [u_OK, v_KI]
    if group_v is not None:
        quantized = _quantize(stage, v_KI, group_v, gram_II, linear)
        encoded[1], v_KI = quantized, dequantize(quantized)
    if group_u is not None:
        gram_KK = None if gram_II is None else v_KI @ gram_II @ v_KI.T
        encoded[0] = _quantize(stage, u_OK, group_u, gram_KK, linear)
    linear.factors = tuple(encoded)
    left = [n for n, size in zip(("weight_u", "weight_v"), sizes, strict=True) if size is None]
    linear.dense_reason = (
        f"{' and '.join(left)}: no group size divides the channels" if left else None
    )


def _group_size(stage: Int4, num_channels: int) -> int | None:
    fitting = [s for s in GROUP_SIZES if s <= stage.group_size and num_channels % s == 0]
    return max(fitting, default=None)


def _quantize(
    stage: Int4, weight_OI: Tensor, group_size: int, gram_II: Tensor | None, linear: Linear
) -> QuantizedWeight:
    settings: _Settings = {"symmetric": stage.symmetric, "scale_dtype": linear.scale_dtype}
    if gram_II is None:
        return round_to_nearest(weight_OI, group_size, **settings)
    if stage.method == "awq":
        return round_in_best_range(weight_OI, gram_II.diagonal(), group_size, **settings)
    return gptq(weight_OI, gram_II, group_size, **settings)


# --- INT8 ---


def _apply_int8(block: Block) -> None:
    for linear in block.linears.values():
        linear.factors = tuple(
            round_to_nearest_int8(factor, scale_dtype=linear.scale_dtype)
            for factor in linear.factors
            if isinstance(factor, Tensor)
        )
        linear.dense_reason = None


def read_plan(path: Path) -> JsonObject | None:
    """A plan as an interrupted run left it."""
    if not path.is_file():
        return None
    plan: JsonObject = json.loads(path.read_text())
    return plan
