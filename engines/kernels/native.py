"""The native CPU library of `cpu/`: how it is built, where it is kept, and its C interface.

Built with the machine's C++ compiler at first use (some ten seconds), kept under `LATHE_HOME/native` by a hash of
everything that it depends on. Whoever cannot have it gets a sentence that says why and uses torch's operations.

Structures and functions mirror `cpu/lathe.h`.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "cpu"
COMPILERS = ("c++", "g++", "clang++")
# No contraction: a fused multiply-add only where the source says so keeps rows independent of their batch.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
NATIVE = "-march=native"
REQUIRED_FEATURES = frozenset({"avx2", "fma", "f16c"})
BUILD_TIMEOUT_SECONDS = 300

FP32, BF16, INT4, INT8, BF16_TILES = range(5)
"""Kinds of a `Segment`."""


class Segment(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("scale_is_fp32", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("stage", ctypes.c_int32),
        ("into_middle", ctypes.c_int32),
        ("in_offset", ctypes.c_int32),
        ("out_offset", ctypes.c_int32),
    )


class Linear(ctypes.Structure):
    _fields_ = (
        ("segments", ctypes.POINTER(Segment)),
        ("num_segments", ctypes.c_int32),
        ("in_features", ctypes.c_int32),
        ("middle_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm_H", ctypes.c_void_p),
        ("post_norm_H", ctypes.c_void_p),
        ("query_norm_D", ctypes.c_void_p),
        ("key_norm_D", ctypes.c_void_p),
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm_H", ctypes.c_void_p),
        ("cos_PR", ctypes.c_void_p),
        ("sin_PR", ctypes.c_void_p),
        ("num_layers", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
        ("rms_norm_epsilon", ctypes.c_float),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("positions_T", ctypes.c_void_p),
        ("slot_mapping_T", ctypes.c_void_p),
        ("block_tables_SB", ctypes.c_void_p),
        ("query_start_S1", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("num_requests", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
    )


class SkipLayer(ctypes.Structure):
    _fields_ = (("linear", Linear), ("mean_H", ctypes.c_void_p), ("is_middle", ctypes.c_int32))


class Skip(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(SkipLayer)),
        ("tau_T", ctypes.c_void_p),
        ("num_skipped_T", ctypes.c_void_p),
        ("k", ctypes.c_int32),
    )


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "lathe_context_destroy": (_POINTER,),
    "lathe_step": (
        *(_POINTER, ctypes.POINTER(Model), ctypes.POINTER(Batch)),
        *(ctypes.POINTER(Skip), _POINTER),
    ),
    "lathe_linear": (_POINTER, ctypes.POINTER(Linear), _POINTER, _INT, _INT, _POINTER, _INT),
    "lathe_dequantize": (_POINTER, ctypes.POINTER(Segment), _POINTER),
    "lathe_rms_norm": (_POINTER, _POINTER, _POINTER, _INT, _INT, ctypes.c_float, _POINTER),
    "lathe_swiglu": (_POINTER, _POINTER, _INT, _INT, _POINTER),
    "lathe_rotate_and_write": (
        *(_POINTER, ctypes.POINTER(Model), _INT),
        *(ctypes.POINTER(Batch), _POINTER),
    ),
    "lathe_attention": (
        *(_POINTER, ctypes.POINTER(Model), _INT),
        *(ctypes.POINTER(Batch), _POINTER, _POINTER),
    ),
    "lathe_long_attention": (
        *(_POINTER, ctypes.POINTER(Model), _INT),
        *(ctypes.POINTER(Batch), _POINTER, _POINTER),
    ),
}


class NativeUnavailableError(Exception):
    """The library cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """Attributes:
    functions: the loaded library.
    context: its threads and buffers; lives as long as the process.
    has_amx: whether it multiplies on AMX; it then takes `BF16_TILES` weights.
    description: for `EngineInfo.kernels` and `lathe doctor`.
    """

    functions: ctypes.CDLL
    context: int
    has_amx: bool
    description: str


@functools.cache
def native_library() -> NativeLibrary | str:
    """The library for this machine, built if need be with as many threads as torch has; or why there is none."""
    import torch

    try:
        return open_library(_cache_folder(), flags=(NATIVE,), num_threads=torch.get_num_threads())
    except NativeUnavailableError as error:
        return str(error)


def open_library(folder: Path, *, flags: Sequence[str], num_threads: int) -> NativeLibrary:
    """Build the library (once) in `folder` with additional compiler flags, and load it.

    Raises:
        NativeUnavailableError: wrong CPU, no compiler, or it failed.
    """
    features = cpu_features()
    lacking = REQUIRED_FEATURES - features
    if lacking:
        raise NativeUnavailableError(f"the CPU has no {', '.join(sorted(lacking))}")
    functions = ctypes.CDLL(str(build(folder, flags=flags)))
    for name, arguments in _SIGNATURES.items():
        getattr(functions, name).argtypes = arguments
        getattr(functions, name).restype = None
    functions.lathe_context_create.argtypes = (_INT,)
    functions.lathe_context_create.restype = _POINTER
    functions.lathe_has_amx.argtypes = ()
    functions.lathe_has_amx.restype = _INT
    context = functions.lathe_context_create(num_threads)
    has_amx = bool(functions.lathe_has_amx())
    used = ["amx_bf16"] if has_amx else []
    used += [name for name in ("avx512_vnni", "avx512_bf16", "avx_vnni") if name in features]
    description = f"native C++, {num_threads} threads, {', '.join(used) or 'avx2'}"
    return NativeLibrary(
        functions=functions, context=context, has_amx=has_amx, description=description
    )


def cpu_features() -> frozenset[str]:
    """Instruction sets as Linux names them; empty where it does not say (no x86, no Linux)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return frozenset()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def build(folder: Path, *, flags: Sequence[str]) -> Path:
    """The shared library in `folder`, compiled unless it is there; processes that want it at once wait for one.

    Raises:
        NativeUnavailableError: no compiler, it failed, or the folder cannot be written.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailableError(f"no C++ compiler ({', '.join(COMPILERS)})")
    sources = sorted(SOURCES.iterdir())
    command = [compiler, *FLAGS, *flags]
    library = folder / f"lathe-{_fingerprint(command, sources)}.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                _compile(command, [s for s in sources if s.suffix == ".cpp"], library)
    except OSError as error:
        raise NativeUnavailableError(f"cannot build in {folder}: {error.strerror}") from None
    return library


def _compile(command: list[str], sources: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        try:
            result = subprocess.run(
                [*command, *map(str, sources), "-o", str(built)],
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NativeUnavailableError(
                f"{command[0]} took more than {BUILD_TIMEOUT_SECONDS} s"
            ) from None
        if result.returncode:
            raise NativeUnavailableError(f"{command[0]} failed: {result.stderr.strip()[-2000:]}")
        built.replace(library)


def _fingerprint(command: list[str], sources: list[Path]) -> str:
    """Of whatever changes the machine code: sources, flags, compiler, and the CPU that -march=native looks at."""
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=False
    ).stdout
    digest = hashlib.sha256()
    for text in (*command, version, platform.machine(), *sorted(cpu_features())):
        digest.update(f"{text}\0".encode())
    for source in sources:
        digest.update(f"{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:24]


def _cache_folder() -> Path:
    """Beside everything else of this installation; the supervisor tells its children where that is."""
    home = os.environ.get("LATHE_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "lathe") / "native"
