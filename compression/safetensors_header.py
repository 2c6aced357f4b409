"""Reads and checks the header of a safetensors file without mapping its data, and without torch.

The format: 8 bytes little-endian header length, a JSON object of name to {dtype, shape, data_offsets}, then the data.
Everything is checked against the file's true size before any tensor is mapped.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

MAX_HEADER_BYTES = 64 * 2**20
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message names the file and the tensor."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Attributes: dtype: safetensors' name, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file, by name.

    Raises:
        CheckpointError: the header is too large, malformed, or does not fit the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path.name}: header length {length} does not fit the file")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path.name}: the header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: the header is not an object")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info, start, end = _parse_entry(path.name, name, entry)
        tensors[name] = info
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise CheckpointError(f"{path.name}: {name} overlaps another tensor or leaves a gap")
        position = end
    if position != size - 8 - length:
        raise CheckpointError(f"{path.name}: tensors cover {position} bytes of {size - 8 - length}")
    return tensors


def _parse_entry(file: str, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{file}: {name} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{file}: {name} has unknown dtype {str(dtype)[:20]!r}")
    sizes, span = _sizes(shape), _sizes(offsets)
    if sizes is None or span is None or len(span) != 2:
        raise CheckpointError(f"{file}: {name} has a malformed shape or offsets")
    info = TensorInfo(dtype, sizes)
    start, end = span
    if end - start != info.num_bytes:
        raise CheckpointError(f"{file}: {name} has {end - start} bytes, its shape {info.num_bytes}")
    return info, start, end


def _sizes(value: object) -> tuple[int, ...] | None:
    """The list as a tuple; None where it is no list of sane sizes."""
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value):
        return tuple(value)
    return None
