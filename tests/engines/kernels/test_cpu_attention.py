"""Which attention long passes have on a CPU; what the native one computes is in test_cpu_step.py and test_model.py."""

import ctypes

import pytest
import torch

from engines.kernels import cpu_attention
from engines.kernels.native import NativeLibrary
from engines.kernels.ops import TORCH_OPS, choose_ops

LIBRARY = NativeLibrary(
    functions=ctypes.CDLL(None), context=0, has_amx=False, description="native C++"
)


def test_what_is_no_cpu_does_not_get_the_cpu_library() -> None:
    assert choose_ops(torch.device("meta"), torch.bfloat16, 64) is TORCH_OPS


@pytest.mark.parametrize(
    ("library", "features", "dtype", "head_dim", "reason"),
    [
        ("no C++ compiler", {"avx512f"}, torch.bfloat16, 64, "no C++ compiler"),
        (LIBRARY, {"avx2"}, torch.bfloat16, 64, "the CPU has no avx512f"),
        (LIBRARY, {"avx512f"}, torch.float16, 64, "no native attention in torch.float16"),
        (LIBRARY, {"avx512f"}, torch.bfloat16, 20, "head_dim 20, a multiple of 16 is needed"),
        (LIBRARY, {"avx512f"}, torch.bfloat16, 64, None),
    ],
)
def test_a_cpu_attends_with_the_library_or_says_why_not(
    library: NativeLibrary | str,
    features: set[str],
    dtype: torch.dtype,
    head_dim: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_attention, "native_library", lambda: library)
    monkeypatch.setattr(cpu_attention, "cpu_features", lambda: features)
    ops = choose_ops(torch.device("cpu"), dtype, head_dim)
    assert (ops.attention is TORCH_OPS.attention) == (reason is not None)
    assert ops.add_rms_norm is TORCH_OPS.add_rms_norm
    expected = "native C++, over blocks as they lie"
    if reason is not None:
        expected = f"{TORCH_OPS.kernels['attention']}; not native: {reason}"
    assert ops.kernels["attention"] == expected
