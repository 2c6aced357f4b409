"""Recipes: the stages that turn a checkpoint into a smaller one, parsed and checked in one place.

YAML, JSON and the job API share one form, a list of one-key objects: `[{"int4": {"group_size": 64}}]`.
Imports no torch: the API process checks a recipe before it accepts a job.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

JsonObject = dict[str, Any]
GroupSize = Literal[32, 64, 128]
GROUP_SIZES: tuple[GroupSize, ...] = get_args(GroupSize)
Int4Method = Literal["rtn"]

# Stages of the design that this version cannot run; named, so that the refusal says so.
PLANNED_STAGES = ("welore", "magnitude", "wanda", "sparsegpt", "structured", "int8", "ffn_skip")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4:
    """Round every linear weight to 4 bits in groups along its input channels.

    Attributes:
        group_size: input channels that share a scale; one of `GROUP_SIZES`.
        method: how codes are chosen; "rtn" is round-to-nearest, without calibration.
        symmetric: no zero point; scale from the largest magnitude. False is more exact and loads here, but not in
            transformers 5.23, which expects the zero points unpacked.
    """

    name: ClassVar[str] = "int4"
    group_size: GroupSize = 64
    method: Int4Method = "rtn"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise RecipeError("group_size", f"group_size must be one of {GROUP_SIZES}")
        if self.method not in get_args(Int4Method):
            raise RecipeError(
                "method", f"method must be one of {get_args(Int4Method)}", unsupported=True
            )
        if type(self.symmetric) is not bool:
            raise RecipeError("symmetric", "symmetric must be true or false")


Stage = Int4
STAGES: dict[str, type[Stage]] = {Int4.name: Int4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Stages in the order in which they run."""

    stages: tuple[Stage, ...]

    def to_json(self) -> list[JsonObject]:
        return [{stage.name: dataclasses.asdict(stage)} for stage in self.stages]


def parse_recipe(stages: Sequence[Mapping[str, Any]]) -> Recipe:
    """Check a recipe.

    Raises:
        RecipeError: naming the field at fault.
    """
    if isinstance(stages, str | bytes) or not isinstance(stages, Sequence) or not stages:
        raise RecipeError("recipe", "recipe must be a list of at least one stage")
    parsed = tuple(_parse_stage(f"recipe[{index}]", stage) for index, stage in enumerate(stages))
    if len(parsed) > 1:
        raise RecipeError("recipe[1]", "weights that are INT4 already cannot be made INT4 again")
    return Recipe(stages=parsed)


def _parse_stage(path: str, stage: Mapping[str, Any]) -> Stage:
    if not isinstance(stage, Mapping) or len(stage) != 1:
        raise RecipeError(path, "a stage is an object with one key, the stage's name")
    name, options = next(iter(stage.items()))
    if name in PLANNED_STAGES:
        raise RecipeError(
            f"{path}.{name}",
            f"stage {name!r} is not available in this version; available: {', '.join(STAGES)}",
            unsupported=True,
        )
    if name not in STAGES:
        raise RecipeError(path, f"unknown stage; available: {', '.join(STAGES)}")
    if not isinstance(options, Mapping):
        raise RecipeError(f"{path}.{name}", "the stage's options must be an object")
    known = {field.name for field in dataclasses.fields(STAGES[name])}
    for option in options:
        if option not in known:
            raise RecipeError(
                f"{path}.{name}", f"unknown option; allowed: {', '.join(sorted(known))}"
            )
    try:
        return STAGES[name](**options)
    except RecipeError as error:
        raise RecipeError(
            f"{path}.{name}.{error.param}", error.message, unsupported=error.unsupported
        ) from None
