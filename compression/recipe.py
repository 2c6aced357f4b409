"""Recipes: the stages that turn a checkpoint into a smaller one, parsed and checked in one place.

YAML, JSON and the job API share one form, a list of one-key objects: `[{"welore": {"err": 0.3}}, {"int4": {}}]`.
Stages run from coarse to fine, because each spoils the ground for coarser ones: codes cannot be factored, factors of
a sparse matrix are not sparse, a factored layer has no neurons to cut. Imports no torch: the API process checks a
recipe before it accepts a job.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

JsonObject = dict[str, Any]
RECIPE_VERSION = 1
GroupSize = Literal[32, 64, 128]
GROUP_SIZES: tuple[GroupSize, ...] = get_args(GroupSize)
Int4Method = Literal["rtn", "gptq", "awq"]
RankCount = Literal["all", "lrc_only"]
RankAllocation = Literal["welore", "uniform", "owl"]
SparsityAllocation = Literal["uniform", "owl"]
Calibrated = Literal["none", "activation"]
RankMultiple = Literal[1, 8, 16, 32, 64, 128]
ExportFormat = Literal["dense", "compressed-tensors", "nemotron-nas"]
"""What `export.export` writes; here, because the API process checks it without torch."""
FFN_WIDTH_MULTIPLE = 64
OWL_MIN_M = 8
DEFAULT_CALIBRATION_CORPUS: Literal["wikipedia-summaries"] = "wikipedia-summaries"


class RecipeError(ValueError):
    """A recipe that cannot be run.

    Attributes:
        param: dotted path of the field at fault, starting with "recipe".
        unsupported: the stage or option is known but not available, rather than malformed.
    """

    def __init__(self, param: str, message: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.message = message
        self.unsupported = unsupported


def _check_choice(stage: object, field: str, allowed: Any) -> None:
    value, choices = getattr(stage, field), get_args(allowed)
    if value not in choices or type(value) is bool:
        raise RecipeError(field, f"{field} must be one of {choices}, got {value!r}")


def _check_fraction(field: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 < value < 1:  # type: ignore[operator]
        raise RecipeError(field, f"{field} must be between 0 and 1, both excluded, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortGpt:
    """Remove the decoder blocks that change their input least (ShortGPT, Men et al. 2024, arXiv:2403.03853).

    Attributes:
        remove: number of blocks.
    """

    name: ClassVar[str] = "shortgpt"
    order: ClassVar[int] = 0
    calibrated: ClassVar[bool] = True
    remove: int

    def __post_init__(self) -> None:
        if type(self.remove) is not int or self.remove < 1:
            raise RecipeError("remove", f"remove must be at least 1, got {self.remove!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """Cut the least active neurons and attention heads out of every block, to one width (Minitron's importance,
    Muralidharan et al. 2024, arXiv:2407.14679). The result is smaller and faster for real. At least one is given.

    Attributes:
        ffn_width: neurons that stay in each block, a multiple of 64.
        num_key_value_heads: key-value heads that stay, each with the query heads that read it.
        heads_per_group: query heads that stay beside each key-value head.
    """

    name: ClassVar[str] = "structured"
    order: ClassVar[int] = 1
    calibrated: ClassVar[bool] = True
    ffn_width: int | None = None
    num_key_value_heads: int | None = None
    heads_per_group: int | None = None

    def __post_init__(self) -> None:
        if self.ffn_width is None and not self.cuts_heads:
            raise RecipeError(
                "ffn_width",
                "one of ffn_width, num_key_value_heads and heads_per_group is required",
            )
        width = self.ffn_width
        if width is not None and (
            type(width) is not int or width < 1 or width % FFN_WIDTH_MULTIPLE
        ):
            raise RecipeError(
                "ffn_width", f"ffn_width must be a multiple of {FFN_WIDTH_MULTIPLE}, got {width!r}"
            )
        for field in ("num_key_value_heads", "heads_per_group"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise RecipeError(field, f"{field} must be at least 1, got {value!r}")

    @property
    def cuts_heads(self) -> bool:
        return self.num_key_value_heads is not None or self.heads_per_group is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flap:
    """Cut the neurons and groups of heads that fluctuate least wherever in the model they are, and let biases stand in
    for their mean (FLAP, An et al. 2023, arXiv:2312.11983). Blocks end up of unequal shape.

    Attributes:
        sparsity: fraction of the blocks' weights that goes; widths are rounded to multiples of 64.
    """

    name: ClassVar[str] = "flap"
    order: ClassVar[int] = Structured.order
    calibrated: ClassVar[bool] = True
    sparsity: float

    def __post_init__(self) -> None:
        _check_fraction("sparsity", self.sparsity)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeLore:
    """Factor the low-rank components of the decoder blocks (WeLore, Jaiswal et al. 2024, arXiv:2407.11239).

    Attributes:
        err: target effective rank reduction: the share of all ranks that goes.
        count: "lrc_only" factors matrices that lose more than half of their rank and leaves the others as they are;
            "all" cuts every matrix to its rank, and stores the product where factors would be no smaller.
        allocation: "welore" gives each matrix the rank that one threshold on its normalised singular values leaves;
            "uniform" gives all the same share; "owl" gives blocks with more outliers more (arXiv:2310.05175). Those
            are the baselines.
        calibration: "activation" weighs errors by calibration inputs (SVD-LLM, Wang et al. 2024, arXiv:2403.07378).
        rank_multiple: ranks are rounded up to a multiple; the threshold is solved for the ranks as rounded.
    """

    name: ClassVar[str] = "welore"
    order: ClassVar[int] = 2
    err: float
    count: RankCount = "lrc_only"
    allocation: RankAllocation = "welore"
    calibration: Calibrated = "none"
    rank_multiple: RankMultiple = 32

    def __post_init__(self) -> None:
        _check_fraction("err", self.err)
        _check_choice(self, "count", RankCount)
        _check_choice(self, "allocation", RankAllocation)
        _check_choice(self, "calibration", Calibrated)
        _check_choice(self, "rank_multiple", RankMultiple)
        if self.allocation != "welore" and self.count == "lrc_only":
            raise RecipeError(
                "count",
                f"{self.allocation} ranks make no matrix low rank or all: count must be 'all' with them",
            )

    @property
    def calibrated(self) -> bool:
        return self.calibration == "activation" or self.allocation == "owl"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sparse:
    """Attributes:
    sparsity: fraction of the weights that become zero, or a pattern such as "2:4".
    allocation: "owl" makes blocks with fewer outliers sparser, around that mean (arXiv:2310.05175).
    """

    order: ClassVar[int] = 3
    sparsity: float | str
    allocation: SparsityAllocation = "uniform"

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, str):
            pattern = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", self.sparsity)
            if pattern is None or int(pattern[1]) >= int(pattern[2]):
                raise RecipeError(
                    "sparsity", f'a pattern is N:M with N < M, such as "2:4", got {self.sparsity!r}'
                )
            if self.allocation == "owl" and int(pattern[2]) < OWL_MIN_M:
                raise RecipeError(
                    "allocation",
                    f"of {pattern[2]} inputs no block can keep a little more than {pattern[1]}:"
                    f" owl needs N:M with M of at least {OWL_MIN_M}",
                )
        else:
            _check_fraction("sparsity", self.sparsity)
        _check_choice(self, "allocation", SparsityAllocation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude(_Sparse):
    """Zero the smallest weights of every matrix. Saves no time by itself, like all unstructured sparsity."""

    name: ClassVar[str] = "magnitude"

    @property
    def calibrated(self) -> bool:
        return self.allocation == "owl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda(_Sparse):
    """Zero the weights with the least |weight| * input norm (Sun et al. 2023, arXiv:2306.11695)."""

    name: ClassVar[str] = "wanda"
    calibrated: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGpt(_Sparse):
    """Zero weights and let the others make up for it (Frantar and Alistarh 2023, arXiv:2301.00774)."""

    name: ClassVar[str] = "sparsegpt"
    calibrated: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4:
    """Round every linear weight of the blocks, or both its factors, to 4 bits in groups along the input channels.

    Attributes:
        group_size: input channels that share a scale. A factor whose rank is no multiple of it gets the largest size
            that divides the rank; its row in the manifest says so.
        method: how codes are chosen; "rtn" is round-to-nearest, without calibration.
        symmetric: no zero point; scale from the largest magnitude. False is more exact and loads here, but not in
            transformers 5.23, which expects the zero points unpacked.
    """

    name: ClassVar[str] = "int4"
    order: ClassVar[int] = 4
    group_size: GroupSize = 64
    method: Int4Method = "rtn"
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check_choice(self, "group_size", GroupSize)
        _check_choice(self, "method", Int4Method)
        if type(self.symmetric) is not bool:
            raise RecipeError("symmetric", "symmetric must be true or false")

    @property
    def calibrated(self) -> bool:
        return self.method != "rtn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Round every linear weight of the blocks, or both its factors, to 8 bits with one scale to each output channel."""

    name: ClassVar[str] = "int8"
    order: ClassVar[int] = Int4.order
    calibrated: ClassVar[bool] = False


Stage = ShortGpt | Structured | Flap | WeLore | Magnitude | Wanda | SparseGpt | Int4 | Int8
STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (ShortGpt, Structured, Flap, WeLore, Magnitude, Wanda, SparseGpt, Int4, Int8)
}
# Why no stage of the same or a lower order may follow a stage of this order.
_SPOILS = {
    ShortGpt.order: "blocks are chosen once, against the original model",
    Structured.order: "its neurons were chosen by what came before it",
    WeLore.order: "factored layers have neither neurons to cut nor a second factoring",
    _Sparse.order: "cutting or factoring a sparse matrix undoes its zeros",
    Int4.order: "its codes cannot be changed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Which text calibrated stages see. Samples come from the second half of a corpus, in which nothing is evaluated,
    or from anywhere in an uploaded file.

    Attributes:
        file: id of an uploaded file, to use in place of the corpus.
        samples: sequences; length: tokens in each; seed: of their random positions.
    """

    corpus: str = DEFAULT_CALIBRATION_CORPUS
    file: str | None = None
    samples: int = 32
    length: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Stages in the order in which they run."""

    stages: tuple[Stage, ...]

    @property
    def calibrated(self) -> bool:
        return any(stage.calibrated for stage in self.stages)

    def to_json(self) -> list[JsonObject]:
        return [{stage.name: dataclasses.asdict(stage)} for stage in self.stages]


def parse_recipe(
    stages: Sequence[Mapping[str, Any]], *, done: Sequence[Mapping[str, Any]] = ()
) -> Recipe:
    """Check a recipe.

    Args:
        done: stages that the source went through already.

    Raises:
        RecipeError: naming the field at fault.
    """
    if isinstance(stages, str | bytes) or not isinstance(stages, Sequence) or not stages:
        raise RecipeError("recipe", "recipe must be a list of at least one stage")
    parsed = tuple(_parse_stage(f"recipe[{index}]", stage) for index, stage in enumerate(stages))
    earlier = tuple(_parse_stage("source", stage) for stage in done)
    before: Stage | None = None
    for index, stage in enumerate((*earlier, *parsed)):
        if before is not None:
            path = f"recipe[{max(index - len(earlier), 0)}].{stage.name}"
            _check_order(path, before, stage)
        before = stage
    return Recipe(stages=parsed)


def _check_order(path: str, before: Stage, after: Stage) -> None:
    if after.order <= before.order:
        raise RecipeError(
            path, f"{after.name} cannot follow {before.name}: {_SPOILS[before.order]}"
        )
    if isinstance(before, _Sparse) and isinstance(after, Int4) and after.method == "gptq":
        raise RecipeError(
            f"{path}.method", f"after {before.name}: gptq moves weights that are zero off zero"
        )


def _parse_stage(path: str, stage: Mapping[str, Any]) -> Stage:
    if not isinstance(stage, Mapping) or len(stage) != 1:
        raise RecipeError(path, "a stage is an object with one key, the stage's name")
    name, options = next(iter(stage.items()))
    if name == "nf4":
        raise RecipeError(
            f"{path}.{name}",
            "nf4 is for comparison only (evaluation/nf4.py): it can be measured, not stored or served",
            unsupported=True,
        )
    if name == "ffn_skip":
        raise RecipeError(
            f"{path}.{name}", "skipping changes no weights: submit a job of type calibrate_skip"
        )
    if name not in STAGES:
        raise RecipeError(path, f"unknown stage; available: {', '.join(STAGES)}")
    if not isinstance(options, Mapping):
        raise RecipeError(f"{path}.{name}", "the stage's options must be an object")
    fields = {field.name: field for field in dataclasses.fields(STAGES[name])}
    for option in options:
        if option not in fields:
            raise RecipeError(
                f"{path}.{name}", f"unknown option; allowed: {', '.join(sorted(fields))}"
            )
    for field in fields.values():
        if field.name not in options and field.default is dataclasses.MISSING:
            raise RecipeError(f"{path}.{name}.{field.name}", f"{field.name} is required")
    try:
        return STAGES[name](**options)
    except RecipeError as error:
        raise RecipeError(
            f"{path}.{name}.{error.param}", error.message, unsupported=error.unsupported
        ) from None
