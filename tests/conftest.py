"""Fixtures that several rooms share, and how the tests meet a GPU.

Where there is none, Triton kernels run in its interpreter, on CPU tensors; where there is one, the same tests run
them compiled, and those marked `cuda` run too.
"""

import os
from pathlib import Path

import pytest

from conformance.tiny import write_tiny_llama
from engines.process import set_torch_environment

# Before torch is imported: with a busy neighbour, threads that spin make small products ten times as slow.
set_torch_environment()
REPOSITORY = Path(__file__).parent.parent
# The device itself: in a container the driver's other files may be there without it.
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; docs/gpu.md says how"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in Hugging Face's layout, float32, untied."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def real_home() -> Path:
    """A LATHE_HOME with the packaged models, converted once and kept in .cache/."""
    from compression.import_model import PACKAGED_MODELS, import_packaged
    from compression.registry import ModelNotFoundError, ModelRegistry

    home = REPOSITORY / ".cache" / "test-home"
    registry = ModelRegistry(home / "models")
    for model_id in PACKAGED_MODELS:
        try:
            registry.get(model_id)
        except ModelNotFoundError:
            import_packaged(registry, model_id)
    return home
