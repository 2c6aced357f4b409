"""Typed job specifications: what a POST /v1/jobs may say. Checked in full before a job is accepted."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from compression.checkpoint import Manifest
from compression.recipe import (
    DEFAULT_CALIBRATION_CORPUS,
    STAGES,
    ExportFormat,
    RecipeError,
    parse_recipe,
)
from compression.registry import MODEL_ID_PATTERN
from evaluation.corpora import CorpusName
from graph.arrow_stream import EmbeddingDtype
from graph.enrich_types import LongText, Output, Priority
from graph.llaga.filling import Template
from graph.llaga.hops import HopOperator
from graph.llaga.projector import PROJECTOR_ID_PATTERN
from graph.llaga.prompts import Task
from graph.selection.request import SelectRequest
from graph.store import GRAPH_ID_PATTERN, GraphInfo
from jobs.files import FILE_ID_PATTERN
from jobs.store import JsonObject
from training.spec import METHODS, FinetuneSettings, SettingsError, parse_settings
from training.spec import check_source as check_finetune_source

PLANNED_TYPES = ("evaluate",)
MAX_STAGES = 16
MAX_TARGETS = 8
MAX_METADATA = 16
MAX_ENRICH_NODE_IDS = 100_000
MAX_ENRICH_ANSWER_TOKENS = 1024
DEFAULT_TARGETS = (0.1, 0.2, 0.25, 0.3)


class SpecError(Exception):
    """A specification that cannot be run.

    Attributes:
        param: dotted name of the field at fault.
        code: "invalid_value" or "unsupported_parameter".
    """

    def __init__(self, param: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.message = message
        self.code = code


def _recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for the API's documentation; `parse_recipe` is what checks one."""
    closed = {"additionalProperties": False}
    stages = {name: TypeAdapter(stage).json_schema() | closed for name, stage in STAGES.items()}
    one = {"minProperties": 1, "maxProperties": 1}
    stage_schema = {"type": "object", "properties": stages} | one | closed
    return {"type": "array", "items": stage_schema, "minItems": 1, "maxItems": MAX_STAGES}


def _settings_schema() -> dict[str, Any]:
    """JSON Schema of finetuning settings, for the API's documentation; `parse_settings` is what checks them."""
    closed = {"additionalProperties": False}
    schema = TypeAdapter(FinetuneSettings).json_schema()
    methods = {name: TypeAdapter(m).json_schema() | closed for name, m in METHODS.items()}
    one = {"type": "object", "minProperties": 1, "maxProperties": 1, "properties": methods}
    method = {"oneOf": [{"enum": list(METHODS)}, one | closed]}
    properties = {**schema["properties"], "method": method}
    return {"type": "object", "properties": properties, "required": ["method"]} | closed


class _Spec(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Gate(_Spec):
    """Limits that a compressed model must keep to be registered."""

    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    min_top1_agreement: float | None = Field(default=None, gt=0, le=1)


class CalibrationSpec(_Spec):
    """Text that calibrated stages see: random windows from the second half of a packaged corpus, or from an uploaded
    file of purpose `calibration`."""

    corpus: CorpusName | None = Field(
        default=None, description=f"Of neither, it is {DEFAULT_CALIBRATION_CORPUS}."
    )
    file: str | None = Field(default=None, pattern=FILE_ID_PATTERN)
    samples: int = Field(default=32, ge=1, le=1024)
    length: int = Field(default=512, ge=16, le=4096)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.corpus is not None:
            raise ValueError("name a corpus or a file, not both")
        if self.file is None and self.corpus is None:
            self.corpus = DEFAULT_CALIBRATION_CORPUS
        return self


class CompressSpec(_Spec):
    """Compress `model` by `recipe` and register the result as `output`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "compress",
                    "model": "smollm2-135m",
                    "output": "smollm2-135m-int4",
                    "recipe": [{"int4": {"group_size": 64, "method": "rtn"}}],
                }
            ]
        }
    )

    type: Literal["compress"]
    model: str = Field(max_length=96)
    output: str = Field(pattern=MODEL_ID_PATTERN)
    recipe: Annotated[
        list[dict[str, Any]],
        Field(min_length=1, max_length=MAX_STAGES),
        WithJsonSchema(_recipe_schema()),
    ]
    calibration: CalibrationSpec | None = None
    gate: Gate | None = None


class SkipGate(_Spec):
    """What a share of skipped rows may cost; shares that cost more are not offered."""

    max_perplexity_ratio: float = Field(default=1.5, gt=0)


class CalibrateSkipSpec(_Spec):
    """Find out how feed-forwards of `model` may be skipped, and register the same weights with that profile as
    `output` (FFN-SkipLLM).

    Attributes:
        target_ratios: shares of all (row, layer) pairs behind the warm-up, in (0, 1); a request for the profile gets
            the highest that the gate lets through.
        k: feed-forwards to skip after a hit.
        warm_up: generated tokens that run at full strength.
        substitutes: fit what stands in for a skipped feed-forward; without, it adds nothing, as in the paper.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "calibrate_skip",
                    "model": "smollm2-135m",
                    "output": "smollm2-135m-skip",
                    "target_ratios": [0.1, 0.2],
                }
            ]
        }
    )

    type: Literal["calibrate_skip"]
    model: str = Field(max_length=96)
    output: str = Field(pattern=MODEL_ID_PATTERN)
    target_ratios: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1, strict=True)], ...],
        Field(min_length=1, max_length=MAX_TARGETS, strict=False),  # JSON's list is a tuple here
    ] = DEFAULT_TARGETS
    k: int = Field(default=1, ge=1, le=64)
    warm_up: int = Field(default=25, ge=0, le=1024)
    substitutes: bool = True
    calibration: CalibrationSpec = CalibrationSpec()
    gate: SkipGate = SkipGate()

    @field_validator("target_ratios")
    @classmethod
    def _differ(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ratios)) < len(ratios):
            raise ValueError("target ratios must differ")
        return ratios


class ExportSpec(_Spec):
    """Write `model` for other programs, as the job's artifact: one tar archive."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"type": "export", "model": "smollm2-135m-int4", "format": "dense"}]
        }
    )

    type: Literal["export"]
    model: str = Field(max_length=96)
    format: ExportFormat = "dense"


class FinetuneSpec(_Spec):
    """Train `model` on an uploaded file and register the result as `output`.

    Attributes:
        validation_file: without, a share of the training examples is kept back to evaluate on.
        metadata: the client's own notes, given back as they are.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "finetune",
                    "model": "smollm2-135m",
                    "output": "smollm2-135m-mine",
                    "training_file": "file-0123456789abcdef01234567",
                    "settings": {"method": {"qgalore": {"rank": 64}}, "epochs": 2},
                }
            ]
        }
    )

    type: Literal["finetune"]
    model: str = Field(max_length=96)
    output: str = Field(pattern=MODEL_ID_PATTERN)
    training_file: str = Field(pattern=FILE_ID_PATTERN)
    validation_file: str | None = Field(default=None, pattern=FILE_ID_PATTERN)
    settings: Annotated[dict[str, Any], WithJsonSchema(_settings_schema())]
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = Field(default=None, max_length=MAX_METADATA)


class EnrichBudgetSpec(_Spec):
    """The first limit that is reached stops the run; what was not done is `skipped_budget`."""

    max_nodes: int | None = Field(default=None, ge=1, description="The first so many nodes.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Prompt and generated tokens of LLM calls."
    )
    max_seconds: float | None = Field(default=None, gt=0, description="Of work, over all attempts.")
    max_cost: float | None = Field(
        default=None, gt=0, le=1e9, description="`max_tokens` by `cost_per_million_tokens`."
    )
    cost_per_million_tokens: float | None = Field(
        default=None, ge=1e-6, le=1e9, description="By default the server's, where it names one."
    )


class EnrichSpec(_Spec):
    """Enrich any number of nodes: of `graph`, which `node_ids` name or `select` chooses, or all of them; or of an
    uploaded `file` of purpose `enrich`.

    Artefacts: `enriched.arrow`, an Arrow stream as POST /v1/enrich answers with, and `enriched.jsonl`, whose vectors
    are base64; both in the order of the nodes.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "enrich",
                    "graph": "graph-0123456789abcdef01234567",
                    "prompt": "summary",
                    "return": ["text", "embedding"],
                }
            ]
        }
    )

    type: Literal["enrich"]
    graph: str | None = Field(default=None, max_length=100)
    node_ids: list[str | int] | None = Field(
        default=None, min_length=1, max_length=MAX_ENRICH_NODE_IDS
    )
    select: SelectRequest | None = Field(
        default=None, description="As in POST /v1/graphs/{id}/select; results are best first."
    )
    file: str | None = Field(default=None, pattern=FILE_ID_PATTERN)
    prompt: str = Field(max_length=100, description="An id of the catalog, or id@version.")
    model: str | None = Field(
        default=None, max_length=96, description="By default as in POST /v1/enrich."
    )
    embedding_model: str | None = Field(default=None, max_length=96)
    return_: list[Output] = Field(default=["text"], alias="return", min_length=1, max_length=2)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_ENRICH_ANSWER_TOKENS)
    long_text: LongText = "head"
    classes: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(
        default=None, min_length=1, max_length=256, description="As in POST /v1/enrich."
    )
    variables: dict[
        Annotated[str, Field(max_length=32)], Annotated[str, Field(max_length=20_000)]
    ] = {}
    priority: Priority = "bulk"
    budget: EnrichBudgetSpec = EnrichBudgetSpec()
    embedding_dtype: EmbeddingDtype = "float16"


class ProjectorTemplate(_Spec):
    """How a node's surroundings become vectors: `ho` (Hop-Field Overview) is one per hop, averaged by `operator`; `nd`
    (Neighborhood Detail) is a tree in which every node has `fanout` children."""

    kind: Literal["ho", "nd"] = "ho"
    hops: int | None = Field(default=None, description="4 of ho, 2 of nd.")
    operator: HopOperator | None = Field(default=None, description="Of ho: sym_selfloop.")
    fanout: int | None = Field(default=None, description="Of nd: 5.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "ho":
            self.hops = 4 if self.hops is None else self.hops
            self.operator = self.operator or "sym_selfloop"
        else:
            self.hops = 2 if self.hops is None else self.hops
            self.fanout = 5 if self.fanout is None else self.fanout
        Template(kind=self.kind, hops=self.hops, operator=self.operator, fanout=self.fanout)
        return self


class ProjectorTraining(_Spec):
    """Attributes: num_layers: 1 is linear; more have a GELU between layers; dtype: of the frozen LLM."""

    num_layers: int = Field(default=1, ge=1, le=8)
    learning_rate: float = Field(default=5e-4, gt=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=3, ge=1, le=1000)
    batch_size: int = Field(default=16, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class TrainProjectorSpec(_Spec):
    """Train a projector by which `model`, unchanged, reads nodes of a graph, and register it as `output` (LLaGA).

    Attributes:
        embedding_model: whose vectors of the nodes' texts the projector reads; without, the graph's own features.
        tasks: learnt together by one projector.
        max_questions: of each task and split; drawn by the seed.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "train_projector",
                    "graph": "graph-0123456789abcdef01234567",
                    "model": "smollm2-135m",
                    "embedding_model": "all-minilm-l6-v2",
                    "output": "cora-ho",
                    "template": {"kind": "ho", "hops": 4, "operator": "sym_selfloop"},
                    "tasks": ["node_classification"],
                }
            ]
        }
    )

    type: Literal["train_projector"]
    graph: str = Field(pattern=GRAPH_ID_PATTERN)
    model: str = Field(max_length=96)
    embedding_model: str | None = Field(default=None, max_length=96)
    output: str = Field(pattern=PROJECTOR_ID_PATTERN)
    template: ProjectorTemplate = ProjectorTemplate()
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, strict=False)] = ("node_classification",)
    settings: ProjectorTraining = ProjectorTraining()
    max_questions: int | None = Field(default=None, ge=1)

    @field_validator("tasks")
    @classmethod
    def _differ(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("tasks must differ")
        return tasks


Spec = (
    CompressSpec | CalibrateSkipSpec | EnrichSpec | ExportSpec | FinetuneSpec | TrainProjectorSpec
)
SPECS: dict[str, type[Spec]] = {
    "compress": CompressSpec,
    "calibrate_skip": CalibrateSkipSpec,
    "enrich": EnrichSpec,
    "export": ExportSpec,
    "finetune": FinetuneSpec,
    "train_projector": TrainProjectorSpec,
}
JOB_TYPES = tuple(SPECS)


def parse_spec(body: Mapping[str, Any]) -> Spec:
    """Check a job request.

    Raises:
        SpecError
    """
    job_type = body.get("type")
    if job_type in PLANNED_TYPES:
        raise SpecError(
            "type",
            f"job type {job_type!r} is not available in this version; available: {', '.join(JOB_TYPES)}",
            "unsupported_parameter",
        )
    if job_type not in JOB_TYPES:
        raise SpecError("type", f"type must be one of: {', '.join(JOB_TYPES)}")
    try:
        spec = SPECS[job_type].model_validate(body)
        recipe = parse_recipe(spec.recipe) if isinstance(spec, CompressSpec) else None
        if isinstance(spec, FinetuneSpec):
            parse_settings(spec.settings)
        elif isinstance(spec, EnrichSpec):
            _check_enrich(spec)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        unknown = first["type"] == "extra_forbidden"
        raise SpecError(
            _path(first["loc"]),
            "this field is not known here" if unknown else first["msg"],
            "unsupported_parameter" if unknown else "invalid_value",
        ) from None
    except RecipeError as error:
        code = "unsupported_parameter" if error.unsupported else "invalid_value"
        raise SpecError(error.param, error.message, code) from None
    except SettingsError as error:
        raise _settings_error(error) from None
    if recipe is not None and not recipe.calibrated and body.get("calibration") is not None:
        raise SpecError(
            "calibration", "no stage of this recipe is calibrated", "unsupported_parameter"
        )
    return spec


def _check_enrich(spec: EnrichSpec) -> None:
    """Raises: SpecError."""
    if (spec.graph is None) == (spec.file is None):
        raise SpecError("graph", "needs either a graph or a file")
    for param in ("node_ids", "select"):
        if spec.file is not None and getattr(spec, param) is not None:
            raise SpecError(param, f"{param} is for a graph")
    if spec.node_ids is not None and spec.select is not None:
        raise SpecError("select", "needs either node_ids or select")
    if len(set(spec.return_)) < len(spec.return_):
        raise SpecError("return", "return names a part twice")


def spec_json(spec: Spec) -> JsonObject:
    """What is stored of a checked specification, and what its runner reads."""
    stored = spec.model_dump(mode="json", exclude_none=True, by_alias=True)
    if isinstance(spec, FinetuneSpec):
        stored["settings"] = parse_settings(spec.settings).to_json()  # null is a value there
    return stored


def _settings_error(error: SettingsError) -> SpecError:
    param = f"settings.{error.param}" if error.param else "settings"
    code = "unsupported_parameter" if error.unsupported else "invalid_value"
    return SpecError(param, error.message, code)


def check_source(spec: Spec, manifest: Manifest, config: JsonObject) -> None:
    """Whether this model can go through the job, after what it went through already.

    Args:
        manifest, config: its `lathe.json` and `config.json`.

    Raises:
        SpecError
    """
    if manifest.kind != "decoder":
        raise SpecError("model", f"{spec.type} is for decoders only")
    try:
        if isinstance(spec, CompressSpec):
            parse_recipe(spec.recipe, done=manifest.recipe)
        elif isinstance(spec, FinetuneSpec):
            check_finetune_source(parse_settings(spec.settings), manifest, config)
    except RecipeError as error:
        raise SpecError(error.param, error.message) from None
    except SettingsError as error:
        raise _settings_error(error) from None


def check_graph(spec: TrainProjectorSpec, info: GraphInfo) -> None:
    """Whether the graph has what the job asks about.

    Raises:
        SpecError
    """
    if spec.embedding_model is None and info.feature_dim is None:
        raise SpecError(
            "embedding_model", "the graph has no features of its own: name an embedding model"
        )
    if "node_classification" in spec.tasks and not info.has_labels:
        raise SpecError("tasks", "node_classification needs a graph with labels")
    if "link_prediction" in spec.tasks and info.num_edges == 0:
        raise SpecError("tasks", "link_prediction needs a graph with edges")


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else part)
    return path
