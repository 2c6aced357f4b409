"""Finetuning settings: a method, its few options and what every method shares, parsed and checked in one place.

A method is named, or given as an object with one key where it has options: `"qgalore"`, `{"qgalore": {"rank": 64}}`.
Imports no torch: the API process checks settings, and whether they fit a model, before it accepts a job.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from compression.checkpoint import Int4Linear, Int8Linear, LinearKind, LowRankLinear, Manifest

JsonObject = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]
StateBits = Literal[8, 32]
Refresh = Literal["svd", "gram_eigh", "randomized", "warm"]
Similarity = Literal["overlap", "signed_top1"]
AdapterBits = Literal[4, 8]
MAX_LENGTH = 131_072


class SettingsError(ValueError):
    """Settings that cannot be run.

    Attributes:
        param: dotted path of the field at fault, such as "method.qgalore.rank"; empty where it is the whole.
        unsupported: known but not available for this model, rather than malformed.
    """

    def __init__(self, param: str, message: str, *, unsupported: bool = False) -> None:
        super().__init__(f"{param}: {message}" if param else message)
        self.param = param
        self.message = message
        self.unsupported = unsupported


def _check_integer(field: str, value: object, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise SettingsError(field, f"{field} must be a whole number {limit}, got {value!r}")


def _check_number(
    field: str, value: object, low: float, high: float, *, low_included: bool = False
) -> None:
    good = type(value) in (int, float) and (
        low < value < high or (low_included and value == low)  # type: ignore[operator]
    )
    if not good:
        at_least = "from" if low_included else "above"
        raise SettingsError(
            field, f"{field} must be {at_least} {low} and below {high}, got {value!r}"
        )


def _check_choice(field: str, value: object, allowed: Any) -> None:
    choices = get_args(allowed)
    if value not in choices or type(value) is bool:
        raise SettingsError(field, f"{field} must be one of {choices}, got {value!r}")


def _check_bool(field: str, value: object) -> None:
    if type(value) is not bool:
        raise SettingsError(field, f"{field} must be true or false, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adam:
    """Attributes:
    state_bits: of Adam's two moments; 8 keeps them in blocks with a scale each.
    per_layer: update a weight as soon as its gradient is complete, inside the backward pass, and free the gradient.
    """

    state_bits: StateBits = 32
    per_layer: bool = True

    def __post_init__(self) -> None:
        _check_choice("state_bits", self.state_bits, StateBits)
        _check_bool("per_layer", self.per_layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(_Adam):
    """AdamW on every weight."""

    name: ClassVar[str] = "full"
    default_learning_rate: ClassVar[float] = 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class LrcOnly(_Adam):
    """AdamW on the factors of low-rank layers and on norms; all else is frozen (WeLore, Jaiswal et al. 2024,
    arXiv:2407.11239)."""

    name: ClassVar[str] = "lrc_only"
    default_learning_rate: ClassVar[float] = 5e-5
    state_bits: StateBits = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Projected(_Adam):
    """Attributes:
    rank: of the gradient's subspace; a smaller matrix gets all it has.
    scale: factor on what is projected back, GaLore's alpha.
    refresh_interval: optimizer steps between two bases of the subspace.
    refresh: how a basis is found. "svd" is exact; "gram_eigh" as good and faster; "randomized" nearly as good;
        "warm" turns the old basis once towards the new gradient.
    """

    rank: int = 128
    scale: float = 2.0
    refresh_interval: int = 200
    refresh: Refresh = "gram_eigh"

    def __post_init__(self) -> None:
        # Dataclasses with slots are made anew, so that a bare super() would not find its class.
        _Adam.__post_init__(self)
        _check_integer("rank", self.rank, 1)
        _check_number("scale", self.scale, 0, 1e6)
        _check_integer("refresh_interval", self.refresh_interval, 1)
        _check_choice("refresh", self.refresh, Refresh)


@dataclass(frozen=True, slots=True, kw_only=True)
class GaLore(_Projected):
    """Adam in a low-rank subspace of each matrix' gradient (Zhao et al. 2024, arXiv:2403.03507)."""

    name: ClassVar[str] = "galore"
    default_learning_rate: ClassVar[float] = 2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class QGaLore(_Projected):
    """GaLore with INT8 weights, an INT4 basis and 8-bit moments (Zhang et al. 2024, arXiv:2407.08296).

    Attributes:
        lazy: double a matrix' interval while its subspace stays what it is.
        similarity: of two bases, for `lazy`: "overlap" of the subspaces, or "signed_top1" as published.
    """

    name: ClassVar[str] = "qgalore"
    default_learning_rate: ClassVar[float] = 2e-5
    state_bits: StateBits = 8
    lazy: bool = True
    similarity: Similarity = "overlap"

    def __post_init__(self) -> None:
        _Projected.__post_init__(self)
        _check_bool("lazy", self.lazy)
        _check_choice("similarity", self.similarity, Similarity)


@dataclass(frozen=True, slots=True, kw_only=True)
class LrcOnlyQGaLore(QGaLore):
    """Q-GaLore on the factors of low-rank layers, and 8-bit AdamW on norms; all else is frozen."""

    name: ClassVar[str] = "lrc_only_qgalore"
    default_learning_rate: ClassVar[float] = 5e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Adapters on every linear layer of the blocks, merged into the result (Hu et al. 2021, arXiv:2106.09685); by
    peft.

    Attributes:
        alpha: the adapter's product counts alpha / rank times.
    """

    name: ClassVar[str] = "lora"
    default_learning_rate: ClassVar[float] = 2e-4
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        _check_integer("rank", self.rank, 1)
        _check_number("alpha", self.alpha, 0, 1e6)
        _check_number("dropout", self.dropout, 0, 1, low_included=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class QLora(Lora):
    """LoRA on a base of 4 bits (NF4) or 8 (Dettmers et al. 2023, arXiv:2305.14314); by peft and bitsandbytes."""

    name: ClassVar[str] = "qlora"
    bits: AdapterBits = 4

    def __post_init__(self) -> None:
        Lora.__post_init__(self)
        _check_choice("bits", self.bits, AdapterBits)


Method = Full | Lora | QLora | GaLore | QGaLore | LrcOnly | LrcOnlyQGaLore
METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Full, Lora, QLora, GaLore, QGaLore, LrcOnly, LrcOnlyQGaLore)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """What a finetuning run does.

    Attributes:
        epochs: passes over the training rows, unless `max_steps` says how many optimizer steps there are.
        batch_size: rows in one forward pass; gradient_accumulation: passes in one optimizer step.
        learning_rate: the highest; None for the method's own default.
        warmup_ratio: share of the steps in which it rises; it falls along a cosine to a tenth afterwards.
        max_length: tokens in a row. A longer example is refused; plain text is cut.
        packing: put several examples in a row; they do not see each other.
        max_gradient_norm: of all gradients together, those of projected matrices taken in their subspace; None
            for no clipping.
        dtype: of activations and of weights that are not quantized. Updates are added in float32 and, to bfloat16
            weights, rounded stochastically.
        evaluation_share: of the examples kept back where no evaluation file is given; 0 for none.
        evaluate_every: steps; None for only before the first and after the last.
        checkpoint_every: steps between two checkpoints to resume from; the best is kept besides the newest
            `keep_last`.
    """

    method: Method
    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_length: int = 512
    packing: bool = True
    gradient_checkpointing: bool = False
    max_gradient_norm: float | None = 1.0
    seed: int = 0
    dtype: Dtype = "bfloat16"
    evaluation_share: float = 0.1
    evaluate_every: int | None = None
    checkpoint_every: int = 100
    keep_last: int = 2

    def __post_init__(self) -> None:
        for field in (
            "epochs",
            "batch_size",
            "gradient_accumulation",
            "checkpoint_every",
            "keep_last",
        ):
            _check_integer(field, getattr(self, field), 1)
        for field in ("max_steps", "evaluate_every"):
            if getattr(self, field) is not None:
                _check_integer(field, getattr(self, field), 1)
        _check_integer("max_length", self.max_length, 2, MAX_LENGTH)
        _check_integer("seed", self.seed, 0, 2**31 - 1)
        if self.learning_rate is not None:
            _check_number("learning_rate", self.learning_rate, 0, 10)
        if self.max_gradient_norm is not None:
            _check_number("max_gradient_norm", self.max_gradient_norm, 0, 1e9)
        for field in ("warmup_ratio", "weight_decay", "evaluation_share"):
            _check_number(field, getattr(self, field), 0, 1, low_included=True)
        for field in ("packing", "gradient_checkpointing"):
            _check_bool(field, getattr(self, field))
        _check_choice("dtype", self.dtype, Dtype)

    @property
    def peak_learning_rate(self) -> float:
        return (
            self.method.default_learning_rate if self.learning_rate is None else self.learning_rate
        )

    def to_json(self) -> JsonObject:
        """What `parse_settings` reads."""
        shared = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"
        }
        return {"method": {self.method.name: dataclasses.asdict(self.method)}, **shared}


def parse_settings(payload: Mapping[str, Any]) -> FinetuneSettings:
    """Check settings as JSON gives them.

    Raises:
        SettingsError: naming the field at fault.
    """
    if not isinstance(payload, Mapping):
        raise SettingsError("", "settings must be an object")
    fields = {field.name for field in dataclasses.fields(FinetuneSettings)}
    _check_known(payload, fields, "")
    if "method" not in payload:
        raise SettingsError("method", f"method is required; one of {', '.join(METHODS)}")
    method = _parse_method(payload["method"])
    return FinetuneSettings(**{**payload, "method": method})


def _parse_method(value: object) -> Method:
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise SettingsError(
            "method", "method is a name, or an object with one key, the method's name"
        )
    name, options = next(iter(value.items()))
    if name not in METHODS:
        raise SettingsError("method", f"unknown method {name!r}; available: {', '.join(METHODS)}")
    if not isinstance(options, Mapping):
        raise SettingsError(f"method.{name}", "the method's options must be an object")
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    _check_known(options, fields, f"method.{name}.")
    try:
        return METHODS[name](**options)
    except SettingsError as error:
        raise SettingsError(f"method.{name}.{error.param}", error.message) from None


def _check_known(payload: Mapping[str, Any], fields: set[str], prefix: str) -> None:
    for key in payload:
        if key not in fields:
            raise SettingsError(
                f"{prefix}{key}", f"unknown field; allowed: {', '.join(sorted(fields))}"
            )


def check_source(settings: FinetuneSettings, manifest: Manifest, config: JsonObject) -> None:
    """Whether the settings make sense for a checkpoint.

    Args:
        manifest, config: its `lathe.json` and `config.json`.

    Raises:
        SettingsError: it does not; the message says why and what would.
    """
    for field in ("max_position_embeddings", "sliding_window"):
        limit = config.get(field)
        # Rows carry a mask of their own, which does not know of windows.
        if limit is not None and settings.max_length > limit:
            raise SettingsError(
                "max_length",
                f"max_length {settings.max_length:,} exceeds this model's {field}, {limit:,}",
            )
    method = settings.method
    param = f"method.{method.name}"

    def refuse(why: str) -> SettingsError:
        return SettingsError(param, why, unsupported=True)

    if manifest.kind != "decoder":
        raise refuse("only decoders can be finetuned")
    kinds = [matrix.linear for matrix in manifest.matrices]
    low_rank = any(isinstance(kind, LowRankLinear) for kind in kinds)
    if isinstance(method, LrcOnly | LrcOnlyQGaLore) and not low_rank:
        raise refuse(
            f"{method.name} trains the factors of low-rank layers and this model has none;"
            " compress it with welore first"
        )
    if isinstance(method, Lora):
        if any(matrix.sparsity > 0 for matrix in manifest.matrices):
            raise refuse(
                f"{method.name} would fill the zeros of this pruned model when it is merged;"
                " full, galore and qgalore keep them"
            )
        if isinstance(method, QLora) and any(has_codes(kind) for kind in kinds):
            raise refuse(
                "qlora would quantize this quantized model a second time; lora trains adapters on it"
            )


def has_codes(linear: LinearKind) -> bool:
    """Whether the layer, or a factor of it, is stored as INT4 or INT8 codes."""
    factors = (linear.weight_u, linear.weight_v) if isinstance(linear, LowRankLinear) else (linear,)
    return any(isinstance(factor, Int4Linear | Int8Linear) for factor in factors)
