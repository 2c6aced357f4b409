"""The Lathe checkpoint: names, shapes and dtypes on disk, and the manifest `lathe.json`. Nothing else knows them.

A folder of safetensors and JSON, never pickle. Each linear layer is stored by *kind*, and one frozen dataclass per kind
declares its tensors. Reading checks that every promised tensor is there with its shape and dtype and that
nothing else is.
INT4 and INT8 use the names and bits of compressed-tensors' `pack-quantized` format, so other engines read them too; 2:4
sparsity those of its `sparse-24-bitmask`.
A low-rank layer is two such matrices without a bias, `X.weight_u` and `X.weight_v`, each stored by a kind of its own.
`config.json` tells the truth about dimensions: in transformers' own fields where all blocks are alike, and where they
are not, as one `LayerShape` per block under `LAYER_SHAPES`.
Imports no torch; `Checkpoint.tensors` and `CheckpointWriter.add` import it when called.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compression.disk import sync
from compression.ffn_skip.profile import SKIP_FILE, SkipProfile
from compression.safetensors_header import CheckpointError, TensorInfo, read_header

if TYPE_CHECKING:
    from torch import Tensor

JsonObject = dict[str, Any]
# Version 2 added low-rank layers, sparsity, `LAYER_SHAPES` and skip profiles; version 3 INT8, packed 2:4 sparsity and
# biases that the architecture does not have. All are read for ever.
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
MANIFEST_NAME = "lathe.json"
SHARD_BYTES = 2 * 2**30
LAYER_SHAPES = "layer_shapes"
ModelKind = Literal["decoder", "encoder"]

# Everything a checkpoint may hold besides tensors and the manifest; nothing else is copied in.
ALLOWED_FILES = frozenset(
    {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt",
        "added_tokens.json", "1_Pooling.json", "sentence_bert_config.json",
    }
)  # fmt: skip
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLinear:
    """`X.weight`, and `X.bias` where the layer has one."""

    kind: ClassVar[str] = "dense"
    bits: ClassVar[int] = 16
    out_features: int
    in_features: int
    dtype: str
    bias: bool = False

    def tensors(self) -> dict[str, TensorInfo]:
        """Suffix to dtype and shape."""
        tensors = {"weight": TensorInfo(self.dtype, (self.out_features, self.in_features))}
        return tensors | _bias(self)

    @property
    def parameters(self) -> int:
        """Numbers that the layer multiplies with or adds; zeros of a sparse layer count, scales do not."""
        return _parameters(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Linear:
    """4-bit codes in groups along the input channels: W = (code - zero_point) * scale, codes in [-8, 7].

    Eight codes, each plus 8, share an int32, lowest bits first; zero points are packed along the output channels.
    """

    kind: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    out_features: int
    in_features: int
    dtype: str
    group_size: int
    symmetric: bool
    bias: bool = False

    def tensors(self) -> dict[str, TensorInfo]:
        """Suffix to dtype and shape. `weight_shape` holds (out_features, in_features)."""
        num_groups = self.in_features // self.group_size
        tensors = {
            "weight_packed": TensorInfo("I32", (self.out_features, -(-self.in_features // 8))),
            "weight_scale": TensorInfo(self.dtype, (self.out_features, num_groups)),
            "weight_shape": TensorInfo("I64", (2,)),
        }
        if not self.symmetric:
            packed_rows = -(-self.out_features // 8)
            tensors["weight_zero_point"] = TensorInfo("I32", (packed_rows, num_groups))
        return tensors | _bias(self)

    @property
    def parameters(self) -> int:
        """As of `DenseLinear`."""
        return _parameters(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Linear:
    """8-bit codes with one scale to each output channel: W = code * scale.

    Four codes, each plus 128, share an int32, lowest bits first.
    """

    kind: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    out_features: int
    in_features: int
    dtype: str
    bias: bool = False

    def tensors(self) -> dict[str, TensorInfo]:
        """Suffix to dtype and shape. `weight_shape` holds (out_features, in_features)."""
        tensors = {
            "weight_packed": TensorInfo("I32", (self.out_features, -(-self.in_features // 4))),
            "weight_scale": TensorInfo(self.dtype, (self.out_features, 1)),
            "weight_shape": TensorInfo("I64", (2,)),
        }
        return tensors | _bias(self)

    @property
    def parameters(self) -> int:
        """As of `DenseLinear`."""
        return _parameters(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoFourLinear:
    """Of every four neighbours along the inputs two are stored: `X.compressed` has them, `X.bitmask` a one for each,
    the lowest bit first. No factor of a low-rank layer is of this kind.

    Raises:
        CheckpointError: in_features is no multiple of 4.
    """

    kind: ClassVar[str] = "two_four"
    bits: ClassVar[int] = 16
    out_features: int
    in_features: int
    dtype: str
    bias: bool = False

    def __post_init__(self) -> None:
        if self.in_features % 4:
            raise CheckpointError(f"2:4 with in_features {self.in_features}, no multiple of 4")

    def tensors(self) -> dict[str, TensorInfo]:
        """Suffix to dtype and shape. `shape` holds (out_features, in_features)."""
        tensors = {
            "compressed": TensorInfo(self.dtype, (self.out_features, self.in_features // 2)),
            "bitmask": TensorInfo("U8", (self.out_features, -(-self.in_features // 8))),
            "shape": TensorInfo("I64", (2,)),
        }
        return tensors | _bias(self)

    @property
    def parameters(self) -> int:
        """As of `DenseLinear`: the zeros count."""
        return _parameters(self)


FactorKind = DenseLinear | Int4Linear | Int8Linear
MatrixKind = FactorKind | TwoFourLinear
FACTOR_KINDS: dict[str, type[FactorKind]] = {
    cls.kind: cls for cls in (DenseLinear, Int4Linear, Int8Linear)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankLinear:
    """W ~ weight_u @ weight_v, with `weight_u` (out_features, rank) and `weight_v` (rank, in_features).

    Each factor is a matrix of another kind without a bias. Its tensors are that kind's, with "weight" become
    "weight_u" or "weight_v": `X.weight_u` where dense, `X.weight_u_packed`, `X.weight_u_scale`, `X.weight_u_shape` (and
    `X.weight_u_zero_point`) where INT4, whose groups then lie along the rank.

    Raises:
        CheckpointError: the factors do not fit together.
    """

    kind: ClassVar[str] = "low_rank"
    weight_u: FactorKind
    weight_v: FactorKind
    bias: bool = False

    def __post_init__(self) -> None:
        u, v = self.weight_u, self.weight_v
        if u.in_features != v.out_features or u.dtype != v.dtype or u.bias or v.bias:
            raise CheckpointError(f"low-rank factors do not fit together: {u}, {v}")

    @property
    def out_features(self) -> int:
        return self.weight_u.out_features

    @property
    def in_features(self) -> int:
        return self.weight_v.in_features

    @property
    def rank(self) -> int:
        return self.weight_u.in_features

    @property
    def dtype(self) -> str:
        return self.weight_u.dtype

    @property
    def bits(self) -> int:
        """Of the wider factor."""
        return max(self.weight_u.bits, self.weight_v.bits)

    def tensors(self) -> dict[str, TensorInfo]:
        """Suffix to dtype and shape."""
        u = {factor_suffix("u", s): info for s, info in self.weight_u.tensors().items()}
        v = {factor_suffix("v", s): info for s, info in self.weight_v.tensors().items()}
        return u | v | _bias(self)

    @property
    def parameters(self) -> int:
        """As of `DenseLinear`: rank * (out_features + in_features), and the bias."""
        bias = self.out_features if self.bias else 0
        return self.weight_u.parameters + self.weight_v.parameters + bias


def factor_suffix(factor: Literal["u", "v"], suffix: str) -> str:
    """The name that a factor's tensor has in its layer: "weight_scale" of u is "weight_u_scale"."""
    return f"weight_{factor}{suffix.removeprefix('weight')}"


LinearKind = MatrixKind | LowRankLinear
KINDS: dict[str, type[LinearKind]] = {
    LowRankLinear.kind: LowRankLinear,
    TwoFourLinear.kind: TwoFourLinear,
    **FACTOR_KINDS,
}


def _bias(linear: LinearKind) -> dict[str, TensorInfo]:
    return {"bias": TensorInfo(linear.dtype, (linear.out_features,))} if linear.bias else {}


def _parameters(linear: MatrixKind) -> int:
    return linear.out_features * (linear.in_features + (1 if linear.bias else 0))


def _linear_to_json(linear: LinearKind) -> JsonObject:
    row: JsonObject = {"kind": linear.kind, "bits": linear.bits}
    if not isinstance(linear, LowRankLinear):
        return row | dataclasses.asdict(linear)
    return row | {
        "out_features": linear.out_features,
        "in_features": linear.in_features,
        "rank": linear.rank,
        "dtype": linear.dtype,
        "bias": linear.bias,
        "weight_u": _linear_to_json(linear.weight_u),
        "weight_v": _linear_to_json(linear.weight_v),
    }


def _linear_from_json(row: JsonObject) -> LinearKind:
    """Raises: CheckpointError: unknown kind, or factors that do not fit; KeyError: a field is missing."""
    linear_class = KINDS.get(row.get("kind", ""))
    if linear_class is None:
        raise CheckpointError(f"unknown kind {row.get('kind')!r}")
    if linear_class is not LowRankLinear:
        return linear_class(**{f.name: row[f.name] for f in dataclasses.fields(linear_class)})
    u, v = _linear_from_json(row["weight_u"]), _linear_from_json(row["weight_v"])
    if not isinstance(u, FactorKind) or not isinstance(v, FactorKind):
        raise CheckpointError(f"a factor must be one of {', '.join(FACTOR_KINDS)}")
    return LowRankLinear(weight_u=u, weight_v=v, bias=row["bias"])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Dimensions of one decoder block; `config.json` lists one per block where they are not all alike."""

    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads


def head_dim(config: JsonObject) -> int:
    """Channels of an attention head."""
    stated: int | None = config.get("head_dim")
    return stated or config["hidden_size"] // config["num_attention_heads"]


def layer_shapes(config: JsonObject) -> list[LayerShape] | None:
    """The shapes of a configuration's blocks, or None where transformers' own fields say it all.

    Raises:
        CheckpointError: the field is malformed, or lists another number of blocks than the model has.
    """
    rows = config.get(LAYER_SHAPES)
    if rows is None:
        return None
    try:
        shapes = [LayerShape(**row) for row in rows]
    except TypeError:
        raise CheckpointError(f"config.json: malformed {LAYER_SHAPES}") from None
    for shape in shapes:
        sizes = dataclasses.astuple(shape)
        if any(type(size) is not int or size < 1 for size in sizes) or (
            shape.num_attention_heads % shape.num_key_value_heads
        ):
            raise CheckpointError(f"config.json: {LAYER_SHAPES} has an impossible {shape}")
    if len(shapes) != config.get("num_hidden_layers"):
        raise CheckpointError(
            f"config.json: {len(shapes)} {LAYER_SHAPES}, {config.get('num_hidden_layers')} blocks"
        )
    return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One linear layer of a checkpoint.

    Attributes:
        name: module path, such as "model.layers.0.mlp.up_proj".
        dense_reason: why a recipe left it dense; None where it did not, or had no business with it.
        sparsity: fraction of its weights that a recipe made zero; stored all the same.
    """

    name: str
    linear: LinearKind
    dense_reason: str | None = None
    sparsity: float = 0.0

    @property
    def parameters(self) -> int:
        return self.linear.parameters

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.linear.tensors().values())

    def to_json(self) -> JsonObject:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "bytes": self.num_bytes,
            "dense_reason": self.dense_reason,
            "sparsity": self.sparsity,
            **_linear_to_json(self.linear),
        }

    @classmethod
    def from_json(cls, row: JsonObject) -> "Matrix":
        try:
            linear = _linear_from_json(row)
        except CheckpointError as error:
            raise CheckpointError(f"matrix {row.get('name')}: {error}") from None
        return cls(
            name=row["name"],
            linear=linear,
            dense_reason=row.get("dense_reason"),
            sparsity=row.get("sparsity", 0.0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`lathe.json`: what the folder holds, where it came from, how it was made and what was lost.

    Attributes:
        files: name to {"sha256", "bytes"} of every file but the manifest.
        other_tensors: embeddings, norms and whatever is no linear layer: name to [dtype, shape].
        source: model id or package, and the hash of what was read.
        recipe: stages with all their options; empty for an import.
        ratios: achieved, against the source: {"bytes", "parameters"}, and for low rank {"effective_rank_reduction"}.
        stage_results: per stage, what it decided for the whole model: threshold and ranks, blocks removed.
        calibration: which text calibrated stages saw, with hashes and seed; None where none did.
        evaluations: each with its protocol.
        text: for encoders, {"max_length", "pooling", "normalize"}.
        fingerprint: fixed token ids and the logits they gave, see `hf.fingerprint`.
        skip_profile: how feed-forwards may be skipped; its tensors are in a file of their own, `SKIP_FILE`.
    """

    kind: ModelKind
    source: JsonObject
    matrices: tuple[Matrix, ...]
    other_tensors: dict[str, tuple[str, tuple[int, ...]]]
    recipe: list[JsonObject] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    stage_results: list[JsonObject] = field(default_factory=list)
    calibration: JsonObject | None = None
    evaluations: list[JsonObject] = field(default_factory=list)
    text: JsonObject = field(default_factory=dict)
    fingerprint: JsonObject | None = None
    skip_profile: SkipProfile | None = None
    files: dict[str, JsonObject] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    job_id: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def parameters(self) -> int:
        """All numbers of the model as compressed, without INT4's scales."""
        other = 0
        for _, shape in self.other_tensors.values():
            count = 1
            for size in shape:
                count *= size
            other += count
        other += sum(prod(info.shape) for info in self.skip_tensors().values())
        return other + sum(matrix.parameters for matrix in self.matrices)

    @property
    def tensor_bytes(self) -> int:
        return sum(info.num_bytes for info in self.promised_tensors().values())

    def promised_tensors(self) -> dict[str, TensorInfo]:
        promised = {n: TensorInfo(d, tuple(s)) for n, (d, s) in self.other_tensors.items()}
        for matrix in self.matrices:
            for suffix, info in matrix.linear.tensors().items():
                promised[f"{matrix.name}.{suffix}"] = info
        return promised | self.skip_tensors()

    def skip_tensors(self) -> dict[str, TensorInfo]:
        """The skip profile's, which no model has without it."""
        return {} if self.skip_profile is None else self.skip_profile.tensors()

    def to_json(self) -> JsonObject:
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "matrices": [matrix.to_json() for matrix in self.matrices],
            "skip_profile": None if self.skip_profile is None else self.skip_profile.to_json(),
            "parameters": self.parameters,
            "bytes": self.tensor_bytes,
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> "Manifest":
        version = data.get("format_version")
        if version not in READABLE_VERSIONS:
            raise CheckpointError(
                f"format_version {version!r}, this version reads {READABLE_VERSIONS}"
            )
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        fields["matrices"] = tuple(Matrix.from_json(row) for row in data["matrices"])
        fields["other_tensors"] = {n: (d, tuple(s)) for n, (d, s) in data["other_tensors"].items()}
        if data.get("skip_profile") is not None:
            fields["skip_profile"] = SkipProfile.from_json(data["skip_profile"])
        return cls(**fields)


def read_manifest(folder: Path) -> Manifest:
    """Raises: CheckpointError: no manifest, not JSON, an unknown version or layer kind."""
    try:
        data = json.loads((folder / MANIFEST_NAME).read_bytes())
        return Manifest.from_json(data)
    except FileNotFoundError:
        raise CheckpointError(f"{folder.name}: no {MANIFEST_NAME}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder.name}/{MANIFEST_NAME}: malformed ({error!r})") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one rename."""
    temporary = folder / f".{MANIFEST_NAME}.tmp"
    with temporary.open("w") as file:
        json.dump(manifest.to_json(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / MANIFEST_NAME)


def checkpoint_hash(manifest: Manifest) -> str:
    """sha256 over the hashes of all files, and the skip profile: equal exactly when whatever shapes an answer is."""
    lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(manifest.files.items())]
    if manifest.skip_profile is not None:
        lines.append(json.dumps(manifest.skip_profile.to_json(), sort_keys=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its manifest agrees with its files' headers. Data is not read yet."""

    folder: Path
    manifest: Manifest
    _file_of: Mapping[str, str]

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, "Tensor"]]:
        """Yield (name, tensor on the CPU), file by file; the data stays mapped, not copied."""
        from safetensors import safe_open

        wanted = set(self._file_of if names is None else names)
        for file in sorted({self._file_of[name] for name in wanted}):
            with safe_open(self.folder / file, framework="pt") as tensors:
                for name in sorted(wanted):
                    if self._file_of[name] == file:
                        yield name, tensors.get_tensor(name)

    def tensor(self, name: str) -> "Tensor":
        return next(self.tensors([name]))[1]

    def linear_tensors(self, matrix: Matrix) -> dict[str, "Tensor"]:
        """Those of a linear layer, by suffix."""
        names = {f"{matrix.name}.{suffix}": suffix for suffix in matrix.linear.tensors()}
        return {names[name]: tensor for name, tensor in self.tensors(list(names))}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint and compare its manifest with the headers of its files.

    Raises:
        CheckpointError: a tensor is missing, surplus, or has another shape or dtype than promised.
    """
    manifest = read_manifest(folder)
    present: dict[str, TensorInfo] = {}
    file_of: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, info in read_header(file).items():
            if name in present:
                raise CheckpointError(f"{file.name}: {name} is in {file_of[name]} already")
            present[name] = info
            file_of[name] = file.name
    promised = manifest.promised_tensors()
    for name, info in promised.items():
        if name not in present:
            raise CheckpointError(f"{folder.name}: tensor {name} is missing")
        if present[name] != info:
            raise CheckpointError(f"{folder.name}: {name} is {present[name]}, promised {info}")
    surplus = sorted(present.keys() - promised.keys())
    if surplus:
        raise CheckpointError(f"{folder.name}: tensor {surplus[0]} is not in the manifest")
    return Checkpoint(folder, manifest, file_of)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Attributes: problems: empty exactly when the checkpoint is sound."""

    num_files: int
    num_tensors: int
    num_bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_checkpoint(folder: Path) -> VerifyReport:
    """Read every byte: file hashes, headers, tensors against the manifest. Runs no model."""
    problems: list[str] = []
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return VerifyReport(num_files=0, num_tensors=0, num_bytes=0, problems=(str(error),))
    num_bytes = 0
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            problems.append(f"{name}: missing, or no plain file")
            continue
        num_bytes += path.stat().st_size
        if hash_file(path) != entry["sha256"]:
            problems.append(f"{name}: sha256 differs from the manifest")
    known = set(manifest.files) | {MANIFEST_NAME}
    problems += [f"{p.name}: not in the manifest" for p in folder.iterdir() if p.name not in known]
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        problems.append(str(error))
    return VerifyReport(
        num_files=len(manifest.files),
        num_tensors=len(manifest.promised_tensors()),
        num_bytes=num_bytes,
        problems=tuple(problems),
    )


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointWriter:
    """Writes a checkpoint into an empty folder: tensors shard by shard, then files, then the manifest.

    The folder counts as a checkpoint only once `finish` wrote `lathe.json`, its last file. Peak memory is one shard.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder.name}: not empty")
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_size = 0
        self._shards: list[list[str]] = []
        self._matrices: list[Matrix] = []
        self._other: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._written_bytes = 0

    def add_linear(self, matrix: Matrix, tensors: Mapping[str, "Tensor"]) -> None:
        """Add a linear layer; `tensors` are by suffix and must be what its kind declares."""
        promised = matrix.linear.tensors()
        if tensors.keys() != promised.keys():
            raise CheckpointError(
                f"{matrix.name}: got {sorted(tensors)}, kind needs {sorted(promised)}"
            )
        for suffix, tensor in tensors.items():
            self._add(f"{matrix.name}.{suffix}", tensor, promised[suffix])
        self._matrices.append(matrix)

    def add_other(self, name: str, tensor: "Tensor") -> None:
        """Add an embedding, a norm, or another tensor that is no linear layer's."""
        info = TensorInfo(torch_dtype_name(tensor), tuple(tensor.shape))
        self._add(name, tensor, info)
        self._other[name] = (info.dtype, info.shape)

    def _add(self, name: str, tensor: "Tensor", info: TensorInfo) -> None:
        actual = TensorInfo(torch_dtype_name(tensor), tuple(tensor.shape))
        if actual != info:
            raise CheckpointError(f"{name}: got {actual}, kind promises {info}")
        self._shard[name] = tensor.contiguous()
        self._shard_size += info.num_bytes
        if self._shard_size >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._shard:
            return
        from safetensors.torch import save_file

        path = self._folder / f".shard-{len(self._shards):05d}"
        save_file(self._shard, path, metadata={"format": "pt"})
        sync(path)
        self._written_bytes += self._shard_size
        self._shards.append(list(self._shard))
        self._shard, self._shard_size = {}, 0

    def copy_files(self, source: Path) -> None:
        """Copy the tokenizer and configuration files that a checkpoint may hold."""
        for name in sorted(ALLOWED_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, self._folder / name)

    def write_json(self, name: str, data: JsonObject) -> None:
        (self._folder / name).write_text(json.dumps(data, indent=2) + "\n")

    def finish(self, *, kind: ModelKind, source: JsonObject, **fields: Any) -> Manifest:
        """Name the shards, hash every file and write the manifest. `fields` are those of `Manifest`."""
        self._flush()
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            name = "model.safetensors"
            if len(self._shards) > 1:
                name = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self._folder / f".shard-{index:05d}").rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        if len(self._shards) > 1:
            index_json = {"metadata": {"total_size": self._written_bytes}, "weight_map": weight_map}
            self.write_json(INDEX_NAME, index_json)
        files: dict[str, JsonObject] = {}
        for path in sorted(self._folder.iterdir()):
            sync(path)
            files[path.name] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
        manifest = Manifest(
            kind=kind,
            source=source,
            matrices=tuple(self._matrices),
            other_tensors=self._other,
            files=files,
            **fields,
        )
        write_manifest(self._folder, manifest)
        return manifest


def add_skip_profile(
    source: Path,
    destination: Path,
    profile: SkipProfile,
    tensors: Mapping[str, "Tensor"],
    /,
    **fields: Any,
) -> Manifest:
    """Write the same checkpoint again with a skip profile; its files are shared where the file system can.

    Args:
        destination: an empty folder; it is a checkpoint once this returns.
        tensors: what `SkipProfile.tensors` declares, by full name.
        fields: of `Manifest`, to differ from the source's.

    Raises:
        CheckpointError: the tensors are not as declared, or the source is unsound.
    """
    manifest = open_checkpoint(source).manifest
    promised = profile.tensors()
    actual = {n: TensorInfo(torch_dtype_name(t), tuple(t.shape)) for n, t in tensors.items()}
    if actual != promised:
        raise CheckpointError(f"skip profile promises {promised}, got {actual}")
    destination.mkdir(parents=True, exist_ok=True)
    if any(destination.iterdir()):
        raise CheckpointError(f"{destination.name}: not empty")
    files = {name: entry for name, entry in manifest.files.items() if name != SKIP_FILE}
    for name in files:
        _share(source / name, destination / name)
    if tensors:
        from safetensors.torch import save_file

        path = destination / SKIP_FILE
        save_file(dict(tensors), path, metadata={"format": "pt"})
        sync(path)
        files[SKIP_FILE] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    manifest = dataclasses.replace(
        manifest,
        **{
            "files": files,
            "skip_profile": profile,
            "created_at": time.time(),
            "format_version": FORMAT_VERSION,
            **fields,
        },
    )
    write_manifest(destination, manifest)
    return manifest


def _share(source: Path, destination: Path) -> None:
    """A second name for a file that nobody changes in place; a copy on another file system."""
    try:
        os.link(source, destination)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, destination)
        sync(destination)


def torch_dtype_name(tensor: "Tensor") -> str:
    """safetensors' name of a tensor's dtype."""
    names = {
        "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32", "torch.int32": "I32",
        "torch.int64": "I64", "torch.uint8": "U8", "torch.int8": "I8", "torch.bool": "BOOL",
    }  # fmt: skip
    try:
        return names[str(tensor.dtype)]
    except KeyError:
        raise CheckpointError(f"dtype {tensor.dtype} cannot be stored") from None
