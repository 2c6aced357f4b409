"""What a recipe costs in time: each method timed on two small matrices here, and scaled by how its work grows.

A method's work on a matrix O x I grows as O I (rounding, sorting), O I^2 (AWQ's search), O I^2 + I^3 (GPTQ and
SparseGPT: columns, and the Cholesky factor of the inverse Hessian) or O I min(O, I) (spectra; with whitening I^3 too).
Calibration adds products of all its tokens with every weight, and with themselves where Gram matrices are needed. What
a column or a matrix costs at any size is overhead, found from the two. Attention itself and files are left out.
All seconds are of one core's own time, which other work on the machine does not change; a quiet machine divides large
products among its cores.
Imports torch when it measures.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compression.checkpoint import DenseLinear, Matrix
from compression.plan import block_rows
from compression.recipe import (
    Calibration,
    Flap,
    Int4,
    Int8,
    Magnitude,
    Recipe,
    ShortGpt,
    SparseGpt,
    Stage,
    Structured,
    Wanda,
    WeLore,
)

SIZES = (256, 768)
REPEATS = 3
_SHARES_ITS_INPUT = ("k_proj", "v_proj", "up_proj")  # with q_proj and gate_proj


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Attributes:
    product: core seconds to multiply and add once in a float32 matrix product.
    methods: by stage name.
    """

    product: float
    methods: Mapping[str, "MethodRate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRate:
    """Attributes:
    step: seconds of overhead for one of `_steps`.
    unit: seconds for one unit of `work`.
    """

    step: float
    unit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    block_seconds: float
    num_blocks: int


def cost(model: Mapping[str, Any], recipe: Recipe, calibration: Calibration, rates: Rates) -> Cost:
    """Of compressing the blocks as the source has them, whatever earlier stages remove; evaluation is not in it.

    Args:
        model: `matrices` of a checkpoint, as its manifest or the API gives them.
    """
    blocks = block_rows([Matrix.from_json(dict(row)) for row in model["matrices"]])
    rows = blocks[0]
    weights = sum(row.linear.out_features * row.linear.in_features for row in rows)
    squares = sum(
        row.linear.in_features**2 for row in rows if not row.name.endswith(_SHARES_ITS_INPUT)
    )
    num_tokens = calibration.samples * calibration.length
    seconds = 0.0
    for stage in recipe.stages:
        units = sum(work(stage, row.linear.out_features, row.linear.in_features) for row in rows)
        steps = sum(_steps(stage, row.linear.in_features) for row in rows)
        passes, grams = _calibration_passes(stage)
        rate = rates.methods[stage.name]
        seconds += rate.step * steps + rate.unit * units
        seconds += rates.product * num_tokens * (passes * weights + grams * squares)
    return Cost(block_seconds=seconds, num_blocks=len(blocks))


def work(stage: Stage, out_features: int, in_features: int) -> float:
    """In units that grow as the stage's time on one matrix does."""
    weights = out_features * in_features
    match stage:
        case WeLore():
            whitening = in_features**3 if stage.calibration == "activation" else 0
            return weights * min(out_features, in_features) + whitening
        case SparseGpt():
            return weights * in_features + in_features**3
        case Int4() if stage.method == "gptq":
            return weights * in_features + in_features**3
        case Int4() if stage.method == "awq":
            return weights * in_features
        case _:
            return weights


def _steps(stage: Stage, in_features: int) -> int:
    """How often the stage starts something small on one matrix: for each column, or once."""
    by_column = isinstance(stage, SparseGpt) or (isinstance(stage, Int4) and stage.method == "gptq")
    return in_features if by_column else 1


def _calibration_passes(stage: Stage) -> tuple[int, int]:
    """How often all tokens go through a block, and how often Gram matrices are added up on the way."""
    match stage:
        case ShortGpt():
            return 1, 0
        case Structured():
            return 2, 0
        case Flap():
            return 3, 0
        case WeLore():
            return (3, 2) if stage.calibration == "activation" else (int(stage.calibrated), 0)
        case Magnitude() | Wanda() | SparseGpt():
            planned = int(stage.allocation == "owl")
            applied = 0 if isinstance(stage, Magnitude) else 2
            return planned + applied, int(isinstance(stage, SparseGpt))
        case Int4() | Int8():
            return (2, 1) if stage.calibrated else (0, 0)


def measure_rates(recipe: Recipe) -> Rates:
    """Time a float32 product and every method of the recipe here, on one thread; takes a few seconds."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure_on_one_thread(recipe)
    finally:
        torch.set_num_threads(num_threads)


def _measure_on_one_thread(recipe: Recipe) -> Rates:
    import torch

    generator = torch.Generator().manual_seed(0)
    product = 0.0
    times: dict[str, list[float]] = {stage.name: [] for stage in recipe.stages}
    for size in SIZES:
        weight_OI = torch.randn(size, size, generator=generator)
        x_RI = torch.randn(4 * size, size, generator=generator)
        gram_II = x_RI.T @ x_RI
        product = _seconds(lambda x=x_RI, w=weight_OI: x @ w) / (4 * size**3)  # type: ignore[misc]
        for stage in recipe.stages:
            times[stage.name].append(_seconds(_sample(stage, weight_OI, x_RI, gram_II)))
    methods = {stage.name: _fit(stage, *times[stage.name]) for stage in recipe.stages}
    return Rates(product=product, methods=methods)


def _fit(stage: Stage, small: float, large: float) -> MethodRate:
    """The line through both times; all of the larger where noise has bent it."""
    (steps, more_steps), (units, more_units) = (
        [_steps(stage, size) for size in SIZES],
        [work(stage, size, size) for size in SIZES],
    )
    growth = more_steps / steps
    unit = (large - small * growth) / (more_units - units * growth)
    step = (small - unit * units) / steps
    if unit <= 0 or step < 0:
        return MethodRate(step=0, unit=large / more_units)
    return MethodRate(step=step, unit=unit)


def _seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return min(times)  # the least disturbed


def _sample(stage: Stage, weight_OI: Any, x_RI: Any, gram_II: Any) -> Callable[[], object]:
    """The stage's own work on one matrix."""
    import torch

    from compression.low_rank.factors import factor, singular_values, spectrum
    from compression.pruning.magnitude import magnitude_keep_mask
    from compression.pruning.sparsegpt import sparsegpt
    from compression.pruning.wanda import wanda_keep_mask
    from compression.quantization.awq import search_scale
    from compression.quantization.gptq import gptq
    from compression.quantization.int4 import round_to_nearest
    from compression.quantization.int8 import round_to_nearest_int8

    in_float32: dict[str, Any] = {"scale_dtype": torch.float32}
    match stage:
        case WeLore():
            gram = gram_II if stage.calibration == "activation" else None

            def low_rank() -> None:
                singular_values(weight_OI, gram)  # once for the plan
                factor(weight_OI, spectrum(weight_OI, gram).basis_OR, len(weight_OI) // 4)

            return low_rank
        case SparseGpt():
            return lambda: sparsegpt(weight_OI, gram_II, 0.5)
        case Wanda():
            return lambda: wanda_keep_mask(weight_OI, gram_II.diagonal().sqrt(), 0.5)
        case Magnitude():
            return lambda: magnitude_keep_mask(weight_OI, 0.5)
        case Int8():
            return lambda: round_to_nearest_int8(weight_OI, **in_float32)
        case Int4():
            options = {"symmetric": stage.symmetric, **in_float32}
            size = stage.group_size
            if stage.method == "gptq":
                return lambda: gptq(weight_OI, gram_II, size, **options)
            if stage.method == "awq":
                mean_I = x_RI.abs().mean(dim=0).double()
                return lambda: search_scale([weight_OI], gram_II, mean_I, size, **options)
            return lambda: round_to_nearest(weight_OI, size, **options)
        case ShortGpt() | Structured() | Flap():
            return lambda: weight_OI.clone()  # a copy is all they do to weights


def llama_2_7b() -> dict[str, Any]:
    """Shapes of Llama-2-7B (Touvron et al. 2023, arXiv:2307.09288) in bfloat16, as `plan` takes a model."""
    hidden, width, vocabulary, num_blocks = 4096, 11008, 32000, 32
    shapes = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), (hidden, hidden))
    shapes |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden)}
    shapes |= {"mlp.down_proj": (hidden, width)}
    names = {
        f"model.layers.{index}.{name}": shape
        for index in range(num_blocks)
        for name, shape in shapes.items()
    } | {"lm_head": (vocabulary, hidden)}
    rows = [
        Matrix(name=name, linear=DenseLinear(out_features=o, in_features=i, dtype="BF16"))
        for name, (o, i) in names.items()
    ]
    others = vocabulary * hidden + (2 * num_blocks + 1) * hidden
    return {
        "matrices": [row.to_json() for row in rows],
        "parameters": others + sum(row.parameters for row in rows),
        "bytes": 2 * others + sum(row.num_bytes for row in rows),
        "head_dim": 128,
    }
