"""What a recipe will give, from the manifest's rows alone: parameters, bytes and peak memory before any work.

Exact for codes, sparsity, widths and uniform ranks. WeLore's ranks depend on singular values that nobody has seen yet,
so its figures are the least and the most that the effective rank reduction allows; FLAP's are what rounding in every
block allows. Norms of removed blocks are left in.
Imports no torch.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from compression.checkpoint import (
    SHARD_BYTES,
    DenseLinear,
    FactorKind,
    Int4Linear,
    Int8Linear,
    LinearKind,
    LowRankLinear,
    Matrix,
    MatrixKind,
    TwoFourLinear,
)
from compression.recipe import (
    FFN_WIDTH_MULTIPLE,
    GROUP_SIZES,
    Calibration,
    Flap,
    Int4,
    Int8,
    Magnitude,
    Recipe,
    ShortGpt,
    SparseGpt,
    Structured,
    Wanda,
    WeLore,
)

Case = Literal["least", "most"]
_Kind = TypeVar("_Kind", DenseLinear, Int8Linear, TwoFourLinear)
RUNTIME_BYTES = 400 * 2**20  # Python, torch and transformers, loaded
TOKENS_PER_BATCH = 2048
_IN_BLOCK = re.compile(r"\.(\d+)\.(.+)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Attributes: least, most: equal where the prediction is exact."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Attributes: peak_memory_bytes: of the job's process while it compresses, an estimate from above."""

    parameters: Range
    bytes: Range
    parameters_before: int
    bytes_before: int
    peak_memory_bytes: int


def plan(model: Mapping[str, Any], recipe: Recipe, calibration: Calibration) -> Plan:
    """Predict.

    Args:
        model: `parameters`, `bytes` and `matrices` of a checkpoint, as its manifest or the API gives them; and, to cut
            heads, `head_dim`.
    """
    before = [Matrix.from_json(dict(row)) for row in model["matrices"]]
    others = {
        "parameters": model["parameters"] - sum(row.parameters for row in before),
        "bytes": model["bytes"] - sum(row.num_bytes for row in before),
    }
    cases: tuple[Case, ...] = ("least", "most")
    after = {case: _predict(before, recipe, case, model.get("head_dim")) for case in cases}
    parameters = [others["parameters"] + sum(m.parameters for m in after[case]) for case in cases]
    num_bytes = [others["bytes"] + sum(m.num_bytes for m in after[case]) for case in cases]
    return Plan(
        parameters=Range(least=min(parameters), most=max(parameters)),
        bytes=Range(least=min(num_bytes), most=max(num_bytes)),
        parameters_before=model["parameters"],
        bytes_before=model["bytes"],
        peak_memory_bytes=_peak_memory(before, model, others["parameters"], recipe, calibration),
    )


def _predict(rows: list[Matrix], recipe: Recipe, case: Case, head_dim: int | None) -> list[Matrix]:
    outside = [row for row in rows if not _IN_BLOCK.search(row.name)]
    inside = [row for row in rows if _IN_BLOCK.search(row.name)]
    for stage in recipe.stages:
        match stage:
            case ShortGpt():
                num_blocks = 1 + max(_block(row) for row in inside)
                inside = [row for row in inside if _block(row) < num_blocks - stage.remove]
            case Structured() | Flap():
                inside = _cut(stage, inside, case, head_dim)
            case WeLore():
                ranks = _ranks(stage, inside, case)
                inside = [_factored(row, ranks.get(row.name)) for row in inside]
            case Int4():
                inside = [replace(row, linear=_quantized(stage, row.linear)) for row in inside]
            case Int8():
                inside = [replace(row, linear=_in_int8(row.linear)) for row in inside]
            case Magnitude() | Wanda() | SparseGpt():
                if stage.sparsity == "2:4":
                    inside = [replace(row, linear=_packed(row.linear)) for row in inside]
    return inside + outside


def block_rows(rows: Sequence[Matrix]) -> list[list[Matrix]]:
    """The matrices of each decoder block."""
    blocks: dict[int, list[Matrix]] = {}
    for row in rows:
        if _IN_BLOCK.search(row.name):
            blocks.setdefault(_block(row), []).append(row)
    return [blocks[index] for index in sorted(blocks)]


def _block(row: Matrix) -> int:
    found = _IN_BLOCK.search(row.name)
    assert found
    return int(found[1])


def _cut(
    stage: Structured | Flap, rows: list[Matrix], case: Case, head_dim: int | None
) -> list[Matrix]:
    """Blocks without the neurons and heads that go.

    Raises:
        ValueError: heads go, and `head_dim` is not known.
    """
    sizes = {row.name.rpartition(".")[2]: row.linear for row in rows}
    width, heads = sizes["down_proj"].in_features, sizes["q_proj"].out_features
    key_values = sizes["k_proj"].out_features
    if isinstance(stage, Flap) or stage.cuts_heads:
        if head_dim is None:
            raise ValueError("to predict what cut heads save, head_dim must be known")
        groups, per_group = key_values // head_dim, heads // key_values
        if isinstance(stage, Flap):
            width = _near((1 - stage.sparsity) * width, FFN_WIDTH_MULTIPLE, case, width)
            groups = _near((1 - stage.sparsity) * groups, 1, case, groups)
        else:
            groups = stage.num_key_value_heads or groups
            per_group = stage.heads_per_group or per_group
        heads, key_values = groups * per_group * head_dim, groups * head_dim
    if isinstance(stage, Structured):
        width = stage.ffn_width or width
    outputs = {"gate_proj": width, "up_proj": width, "q_proj": heads}
    outputs |= {"k_proj": key_values, "v_proj": key_values}
    inputs = {"down_proj": width, "o_proj": heads}
    cut = []
    for row in rows:
        name, linear = row.name.rpartition(".")[2], row.linear
        if isinstance(linear, DenseLinear):
            linear = replace(
                linear,
                out_features=outputs.get(name, linear.out_features),
                in_features=inputs.get(name, linear.in_features),
                bias=linear.bias or (isinstance(stage, Flap) and name in inputs),
            )
        cut.append(replace(row, linear=linear))
    return cut


def _near(size: float, multiple: int, case: Case, whole: int) -> int:
    """Half a multiple and more below or above, as rounding may end."""
    if case == "least":
        return max(int(size / multiple - 0.5), 1) * multiple
    return min((int(size / multiple + 0.5) + 1) * multiple, whole)


def _size(row: Matrix) -> int:
    return min(row.linear.out_features, row.linear.in_features)


def _ranks(stage: WeLore, rows: Sequence[Matrix], case: Case) -> dict[str, int]:
    """Ranks that reach the target with the most or the least parameters left."""
    dense = [row for row in rows if row.linear.kind == "dense"]
    multiple = stage.rank_multiple
    if stage.allocation == "uniform":
        return {
            row.name: min(
                max(round((1 - stage.err) * _size(row) / multiple), 1) * multiple, _size(row)
            )
            for row in dense
        }
    # A rank of a matrix m x n, m <= n, is worth from n - m numbers (at half of the rank) to n (at none left).
    stops: list[Callable[[Matrix], int]]
    longest = {row.name: max(row.linear.out_features, row.linear.in_features) for row in dense}
    if case == "least":
        order = sorted(dense, key=lambda row: -longest[row.name])
        stops = [lambda row: _size(row)]
    else:
        order = sorted(dense, key=lambda row: longest[row.name] - _size(row))
        stops = [lambda row: _cheapest_cut(row, stage), lambda row: _size(row)]
    remaining = round(stage.err * sum(_size(row) for row in dense))
    removed = dict.fromkeys((row.name for row in dense), 0)
    for stop in stops:
        for row in order:
            limit = min(stop(row), _size(row) - multiple)
            more = max(min(limit - removed[row.name], remaining), 0)
            removed[row.name] += more
            remaining -= more
    return {
        row.name: max((_size(row) - removed[row.name]) // multiple, 1) * multiple
        for row in dense
        if removed[row.name]
    }


def _cheapest_cut(row: Matrix, stage: WeLore) -> int:
    """Ranks that a matrix can lose at the least gain: up to half of them, or up to break-even where that counts too."""
    if stage.count == "lrc_only":
        return _size(row) // 2 + 1
    m, n = row.linear.out_features, row.linear.in_features
    return int(_size(row) - m * n / (m + n))


def _factored(row: Matrix, rank: int | None) -> Matrix:
    linear = row.linear
    if rank is None or not isinstance(linear, DenseLinear):
        return row
    if (
        rank * (linear.out_features + linear.in_features)
        >= linear.out_features * linear.in_features
    ):
        return row
    u = DenseLinear(out_features=linear.out_features, in_features=rank, dtype=linear.dtype)
    v = DenseLinear(out_features=rank, in_features=linear.in_features, dtype=linear.dtype)
    return replace(row, linear=LowRankLinear(weight_u=u, weight_v=v, bias=linear.bias))


def _quantized(stage: Int4, linear: LinearKind) -> LinearKind:
    if isinstance(linear, LowRankLinear):
        u, v = (
            _quantized_factor(stage, f, GROUP_SIZES) for f in (linear.weight_u, linear.weight_v)
        )
        return LowRankLinear(weight_u=u, weight_v=v, bias=linear.bias)
    return _quantized_factor(stage, linear, (stage.group_size,))


def _quantized_factor(stage: Int4, linear: MatrixKind, group_sizes: Sequence[int]) -> FactorKind:
    if isinstance(linear, TwoFourLinear):
        linear = _with_kind(DenseLinear, linear)
    fitting = [s for s in group_sizes if s <= stage.group_size and linear.in_features % s == 0]
    if not fitting:
        return linear
    return Int4Linear(
        out_features=linear.out_features,
        in_features=linear.in_features,
        dtype=linear.dtype,
        group_size=max(fitting),
        symmetric=stage.symmetric,
        bias=linear.bias,
    )


def _in_int8(linear: LinearKind) -> LinearKind:
    if isinstance(linear, LowRankLinear):
        u, v = (_with_kind(Int8Linear, f) for f in (linear.weight_u, linear.weight_v))
        return LowRankLinear(weight_u=u, weight_v=v, bias=linear.bias)
    return _with_kind(Int8Linear, linear)


def _packed(linear: LinearKind) -> LinearKind:
    """Zeros of other patterns than 2:4 are stored."""
    if not isinstance(linear, DenseLinear) or linear.in_features % 4:
        return linear
    return _with_kind(TwoFourLinear, linear)


def _with_kind(kind: type[_Kind], linear: MatrixKind) -> _Kind:
    return kind(
        out_features=linear.out_features,
        in_features=linear.in_features,
        dtype=linear.dtype,
        bias=linear.bias,
    )


def _peak_memory(
    rows: Sequence[Matrix],
    model: Mapping[str, Any],
    other_parameters: int,
    recipe: Recipe,
    calibration: Calibration,
) -> int:
    """The mapped source, one block in float32 with what is made of it, the shard being written, and calibration."""
    first = block_rows(rows)[0]
    sizes = [row.linear.out_features * row.linear.in_features for row in first]
    total: int = RUNTIME_BYTES + model["bytes"] + min(model["bytes"], SHARD_BYTES)
    total += 2 * 4 * sum(sizes)
    if any(isinstance(stage, WeLore) for stage in recipe.stages):
        total += 4 * 8 * max(sizes)  # float64: weight, Gram matrix, vectors and their workspace
    if recipe.calibrated:
        inputs = [row.linear.in_features for row in first]
        hidden, widest = min(inputs), max(inputs)
        num_tokens = calibration.samples * calibration.length
        total += 2 * 4 * num_tokens * hidden
        total += 4 * other_parameters + 8 * TOKENS_PER_BATCH * widest * 4
        total += 2 * 4 * sum(size**2 for size in sorted(set(inputs)) + [hidden] * 2)
    return total
