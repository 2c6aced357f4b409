"""Enriched vectors on this machine's disk, mapped into memory: what a training loop reads instead of the network.

A folder of three files: `store.json` says what the vectors are, `vectors.bin` holds one row per node, `filled.bin` one
byte per node. The folder appears under its name complete or not at all. A row's byte is set after the row is on the
disk, so that a reader, and whoever opens the store after a crash, sees whole rows only. A row that is filled keeps its
first value.

The maps are shared: a process that is forked, or opens the folder itself, sees what the others write. Writers lock the
folder, readers lock nothing. Maps are read only, and only where something was written: a hole of the sparse file that
finds no space when it is touched ends the process (SIGBUS), a write is refused (OSError).
"""

import contextlib
import fcntl
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lathe_client.errors import StoreMismatchError

VERSION = 1
Dtype = Literal["float16", "float32"]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Vectors = npt.NDArray[Any]


class EnrichmentStore:
    """Vectors by node index. Thread-safe; survives a fork; pickles as its path.

    Args:
        path: the folder; made if it is not there.
        num_nodes: of the graph.
        dim: width of every row.
        encoder: the model that made the vectors.
        origin: whatever else shapes them, such as the graph's content hash, the prompt and the LLM.

    Raises:
        StoreMismatchError: the folder holds something else.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        num_nodes: int,
        dim: int,
        encoder: str,
        origin: str = "",
        dtype: Dtype = "float16",
    ) -> None:
        self.path = Path(path)
        wanted = {
            "version": VERSION,
            "num_nodes": num_nodes,
            "dim": dim,
            "dtype": dtype,
            "encoder": encoder,
            "origin": origin,
        }
        if num_nodes < 1 or dim < 1:
            raise ValueError(f"num_nodes and dim must be at least 1, got {num_nodes} and {dim}")
        if not self.path.exists():
            self._create(wanted)
        self._open()
        for name, value in wanted.items():
            if self._about.get(name) != value:
                raise StoreMismatchError(
                    f"{self.path}: {name} is {self._about.get(name)!r}, this needs {value!r};"
                    " name another folder, or remove this one"
                )

    @classmethod
    def at(cls, path: Path | str) -> "EnrichmentStore":
        """What is there, whatever it is. Raises: StoreMismatchError: nothing readable is."""
        store = cls.__new__(cls)
        store.path = Path(path)
        store._open()
        return store

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return EnrichmentStore.at, (self.path,)

    @property
    def num_nodes(self) -> int:
        return len(self._filled)

    @property
    def dim(self) -> int:
        return int(self._vectors.shape[1])

    @property
    def encoder(self) -> str:
        return str(self._about["encoder"])

    @property
    def num_filled(self) -> int:
        return int(np.count_nonzero(self._filled))

    def has(self, indices: Indices) -> Mask:
        return np.asarray(self._filled).take(indices).astype(bool)

    def lookup(self, indices: Indices) -> tuple[Vectors, Mask]:
        """Rows of the nodes (num_indices, dim), and which of them are there; the others are zeros."""
        filled = self.has(indices)
        if filled.all():
            return np.asarray(self._vectors).take(indices, axis=0), filled
        vectors = np.zeros((len(indices), self.dim), dtype=self._vectors.dtype)
        vectors[filled] = np.asarray(self._vectors).take(indices[filled], axis=0)
        return vectors, filled

    def write(self, indices: Indices, vectors: Vectors) -> int:
        """Fill rows that are not filled yet; how many.

        Raises:
            StoreMismatchError: the vectors have another width.
            ValueError: a vector is not finite, or a node is named twice.
            OSError: the disk is full; no row was filled.
        """
        if vectors.shape != (len(indices), self.dim):
            raise StoreMismatchError(
                f"{self.path}: rows are {self.dim} wide, got shape {vectors.shape} for {len(indices)} nodes"
            )
        order = np.argsort(indices)
        indices, values = indices[order], vectors[order].astype(self._vectors.dtype)
        if (indices[1:] == indices[:-1]).any():
            raise ValueError("a node is named twice")
        if (indices[:1] < 0).any():
            raise IndexError(f"a node's index is at least 0, got {indices[0]}")
        if not np.isfinite(values).all():
            raise ValueError(f"a vector is not finite as {values.dtype}")
        with self._locked():
            new = ~self.has(indices)
            num_new = int(new.sum())
            if num_new:
                _put(self.path / "vectors.bin", indices[new], values[new])
                _put(self.path / "filled.bin", indices[new], np.ones(num_new, dtype=np.uint8))
        return num_new

    def _create(self, about: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}")
        temporary.mkdir()
        try:
            (temporary / "store.json").write_text(json.dumps(about))
            row_bytes = about["dim"] * np.dtype(about["dtype"]).itemsize
            with (temporary / "vectors.bin").open("wb") as file:
                file.truncate(about["num_nodes"] * row_bytes)  # sparse: no disk until written
                os.fsync(file.fileno())
            with (temporary / "filled.bin").open("wb") as file:
                file.write(bytes(about["num_nodes"]))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(
                OSError
            ):  # another process was first, and its folder is not empty
                temporary.rename(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _open(self) -> None:
        try:
            self._about: dict[str, Any] = json.loads((self.path / "store.json").read_text())
            shape = (self._about["num_nodes"], self._about["dim"])
            dtype = np.dtype(self._about["dtype"])
            self._vectors = _map(self.path / "vectors.bin", dtype, shape)
            self._filled = _map(self.path / "filled.bin", np.dtype(np.uint8), shape[:1])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreMismatchError(f"{self.path} is no store of vectors: {error}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """A descriptor of its own each time: one that is shared by a fork would share its lock."""
        with (self.path / "store.json").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Closing would leave it to a process forked meanwhile.
                fcntl.flock(file, fcntl.LOCK_UN)


def _map(path: Path, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    """Raises: ValueError: the file has another size, which NumPy would make fit."""
    num_bytes = dtype.itemsize * math.prod(shape)
    if path.stat().st_size != num_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {num_bytes}")
    return np.memmap(path, dtype, "r", shape=shape)


def _put(path: Path, indices: Indices, rows: Vectors) -> None:
    """Writes rows, whose indices ascend, into a file and onto the disk; neighbours at once."""
    row_bytes = rows.nbytes // len(rows)
    ends = np.flatnonzero(np.diff(indices) != 1) + 1
    with path.open("r+b", buffering=0) as file:
        for start, end in zip([0, *ends], [*ends, len(rows)], strict=True):
            _write_at(
                file.fileno(), memoryview(rows[start:end].tobytes()), indices[start] * row_bytes
            )
        os.fsync(file.fileno())


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:  # a disk that fills up takes a part first
        num_written = os.pwrite(descriptor, data, offset)
        data, offset = data[num_written:], offset + num_written
