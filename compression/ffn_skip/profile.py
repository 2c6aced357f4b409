"""The skip profile: what calibration found out about skipping a model's feed-forwards (FFN-SkipLLM, Jaiswal et al.
2024, arXiv:2404.03865), as `lathe.json` holds it under "skip_profile".

A skipped feed-forward may have a *substitute*, which the paper has not: a constant vector, or a low-rank map of the
normed input. Its tensors stand in `SKIP_FILE`, named after the layer: `bias` (H) for both kinds, and for the map
`weight_u` (H, rank) and `weight_v` (rank, H), so that the output is weight_u @ (weight_v @ normed) + bias.
Imports no torch.
"""

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from compression.safetensors_header import CheckpointError, TensorInfo

JsonObject = dict[str, Any]
PROFILE_VERSION = 1
SKIP_FILE = "skip_profile.safetensors"
MAX_RANK = 32
SubstituteKind = Literal["none", "mean", "linear"]


def substitute_prefix(layer: int) -> str:
    """What the names of a layer's substitute tensors begin with."""
    return f"model.layers.{layer}.mlp.skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitute:
    """What stands in for a skipped feed-forward: nothing, its mean output, or a map of rank `rank`.

    Raises:
        CheckpointError: unknown kind, or a rank that the kind cannot have.
    """

    kind: SubstituteKind = "none"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(SubstituteKind):
            raise CheckpointError(f"unknown substitute kind {self.kind!r}")
        if type(self.rank) is not int or not (
            1 <= self.rank <= MAX_RANK if self.kind == "linear" else self.rank == 0
        ):
            raise CheckpointError(f"a substitute of kind {self.kind} cannot have rank {self.rank}")

    def tensors(self, hidden_size: int, dtype: str) -> dict[str, TensorInfo]:
        """Suffix to dtype and shape."""
        if self.kind == "none":
            return {}
        tensors = {"bias": TensorInfo(dtype, (hidden_size,))}
        if self.kind == "linear":
            tensors["weight_u"] = TensorInfo(dtype, (hidden_size, self.rank))
            tensors["weight_v"] = TensorInfo(dtype, (self.rank, hidden_size))
        return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipPoint:
    """One calibrated threshold.

    Attributes:
        target_ratio: share of all (row, layer) pairs behind the warm-up that was asked for.
        tau: skip the next feed-forwards where the similarity reaches it.
        skip_ratio: share that calibration text reached.
        perplexity_ratio: to the dense model on held-out text; the protocol is among the manifest's evaluations.
    """

    target_ratio: float
    tau: float
    skip_ratio: float
    perplexity_ratio: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipProfile:
    """Attributes:
        cold_start, cold_end: first and last layers whose feed-forward always runs.
        k: feed-forwards to skip after a hit.
        warm_up: generated tokens that run at full strength.
        points: by rising target_ratio; a request for "profile" gets the last.
        substitutes: one per layer.
        dtype: of the substitutes' tensors, as safetensors names it.
        similarity: per layer {"mean", "p10", "p90", "histogram"}, see `statistics.py`.
        calibration: text, samples, seed.

    Raises:
        CheckpointError: the fields contradict each other.
    """

    num_layers: int
    hidden_size: int
    cold_start: int
    cold_end: int
    k: int
    warm_up: int
    points: tuple[SkipPoint, ...]
    substitutes: tuple[Substitute, ...]
    dtype: str
    similarity: list[JsonObject] = field(default_factory=list)
    calibration: JsonObject = field(default_factory=dict)
    version: int = PROFILE_VERSION

    def __post_init__(self) -> None:
        problem = None
        ratios = [point.target_ratio for point in self.points]
        if self.version != PROFILE_VERSION:
            problem = f"version {self.version!r}, this version reads {PROFILE_VERSION}"
        elif min(self.cold_start, self.cold_end, self.warm_up) < 0 or self.k < 1:
            problem = "cold_start, cold_end and warm_up must be at least 0, k at least 1"
        elif self.cold_start + self.cold_end >= self.num_layers:
            problem = f"no layer between {self.cold_start} cold ones and {self.cold_end} cold ones"
        elif len(self.substitutes) != self.num_layers:
            problem = f"{len(self.substitutes)} substitutes for {self.num_layers} layers"
        elif not ratios or any(a >= b for a, b in pairwise(ratios)):
            problem = "points must be there, by rising target_ratio"
        if problem is not None:
            raise CheckpointError(f"skip profile: {problem}")

    def tau(self, target_ratio: float | None = None) -> float:
        """The threshold for a share of rows; between two calibrated shares it is interpolated.

        Args:
            target_ratio: None for the profile's own, its highest.

        Raises:
            ValueError: the share lies outside of what was calibrated.
        """
        ratios = [point.target_ratio for point in self.points]
        if target_ratio is None:
            return self.points[-1].tau
        if not ratios[0] <= target_ratio <= ratios[-1]:
            allowed = f"{ratios[0]} to {ratios[-1]}" if len(ratios) > 1 else f"{ratios[0]}"
            raise ValueError(
                f"target_ratio is {target_ratio}, the model's skip profile was calibrated for {allowed}"
            )
        index = bisect_left(ratios, target_ratio)
        above = self.points[index]
        if above.target_ratio == target_ratio:
            return above.tau
        below = self.points[index - 1]
        share = (target_ratio - below.target_ratio) / (above.target_ratio - below.target_ratio)
        return below.tau + share * (above.tau - below.tau)

    def tensors(self) -> dict[str, TensorInfo]:
        """Full name to dtype and shape of every substitute's tensors."""
        return {
            f"{substitute_prefix(layer)}.{suffix}": info
            for layer, substitute in enumerate(self.substitutes)
            for suffix, info in substitute.tensors(self.hidden_size, self.dtype).items()
        }

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: JsonObject) -> "SkipProfile":
        """Raises: CheckpointError: contradictory or unknown; KeyError, TypeError: malformed."""
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        fields["points"] = tuple(SkipPoint(**point) for point in data["points"])
        fields["substitutes"] = tuple(Substitute(**row) for row in data["substitutes"])
        return cls(**fields)
