"""The Triton kernels compile for GPUs that are not here, and no INT4 or model beyond them is taken."""

import os
import subprocess
import sys

import pytest
import torch

from engines.kernels.ops import TORCH_OPS, choose_ops
from engines.kernels.triton.support import why_no_int4, why_not
from tests.conftest import REPOSITORY

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_kernels_compile_for_ampere_and_hopper() -> None:
    """In bfloat16; docs/gpu.md has the other sizes and float32."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(REPOSITORY / ".cache" / "triton")
    module = "tests.engines.kernels.compile_kernels"
    result = subprocess.run(
        [sys.executable, "-m", module, "bfloat16", "128", "128"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]


def test_what_the_kernels_do_not_take_is_named() -> None:
    assert why_not(CPU, torch.bfloat16, 64) == "no kernels for cpu"
    assert why_not(CUDA, torch.float16, 64) == "no kernels in float16"
    assert why_not(CUDA, torch.bfloat16, 65) == "head_dim 65, even and at most 256 is taken"
    assert why_not(CUDA, torch.bfloat16, 512) == "head_dim 512, even and at most 256 is taken"
    assert why_no_int4(CUDA, torch.bfloat16, 48) == "group_size 48, taken are (32, 64, 128)"


def test_a_gpu_without_triton_runs_on_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ops = choose_ops(CUDA, torch.bfloat16, 64)
    assert ops.attention is TORCH_OPS.attention
    assert not ops.is_recordable
    assert ops.kernels["attention"].endswith("no Triton: the package triton is not installed")


def test_a_gpu_without_a_compiler_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C compiler" in choose_ops(CUDA, torch.bfloat16, 64).kernels["attention"]
