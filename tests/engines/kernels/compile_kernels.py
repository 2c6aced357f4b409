"""Compile the Triton kernels for GPUs that need not be there, with the arguments of real launches.

Run as a program, since where the tests run there may be only the interpreter. Every launch of a kernel is turned into
a compilation down to machine code; NVIDIA's assembler refuses what does not fit. Prints a line for each.
"""

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from compression.quantization.int4 import round_to_nearest
from engines.kernels.metadata import RequestRows, build_metadata
from engines.kernels.triton.int4_matmul import MAX_ROWS, TritonInt4Linear
from engines.kernels.triton.ops import TRITON_OPS
from tests.engines.kernels.test_triton_ops import build_facts, build_layer

CPU = torch.device("cpu")
CAPABILITIES = (80, 90)
MAX_SHARED_BYTES = 101376
"""What a program may have on the consumer cards since Ampere; data centre cards have more."""
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages")

compiled: set[str] = set()


def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for `JITFunction.run`."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    assert set(values) == set(kernel.arg_names), f"{kernel.__name__}: wrong arguments"
    assert all(1 <= size < 2**31 for size in grid)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_aligned = False
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            is_aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            is_aligned = value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[parameter.name] = "fp32"
        if is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    for capability in CAPABILITIES:
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        shared = binary.metadata.shared
        assert binary.asm["cubin"]
        assert shared <= MAX_SHARED_BYTES, f"{kernel.__name__}: {shared} bytes of shared memory"
        compiled.add(f"{kernel.__name__} sm_{capability}")
        print(f"{kernel.__name__} sm_{capability}: {shared} bytes of shared memory", flush=True)


def launch_everything(dtype: torch.dtype, head_dim: int, group_size: int) -> None:
    """Every kernel, with and without what is optional; results are whatever memory held."""
    x_TH = torch.zeros(2, 576, dtype=dtype)
    TRITON_OPS.rms_norm(x_TH, x_TH[0], 1e-5)
    TRITON_OPS.add_rms_norm(x_TH, x_TH, x_TH[0], 1e-5)
    TRITON_OPS.swiglu(x_TH)
    cache = (
        torch.zeros(40, 16, 2, head_dim, dtype=dtype),
        torch.zeros(40, 16, 2, head_dim, dtype=dtype),
    )
    norm_D = torch.zeros(head_dim, dtype=dtype)
    for num_tokens in (1, 5):
        request = RequestRows(start=600, num_tokens=num_tokens, block_table=[0] * 38)
        for window, norm in ((None, None), (300, norm_D)):
            facts = build_facts(build_metadata([request], CPU), head_dim, window)
            layer = build_layer(6, 2, window=window, norm_D=norm)
            heads_TAD = torch.zeros(num_tokens, 10, head_dim, dtype=dtype)
            TRITON_OPS.attention(facts)(heads_TAD, layer, cache)
    for symmetric, num_outputs in ((True, 100), (False, 64 * 256)):  # in parts, and whole
        quantized = round_to_nearest(
            torch.ones(num_outputs, 2 * group_size), group_size,
            symmetric=symmetric, scale_dtype=torch.bfloat16,
        )  # fmt: skip
        linear = TritonInt4Linear(quantized, torch.zeros(num_outputs, dtype=dtype), device=CPU)
        for num_rows in (1, MAX_ROWS, MAX_ROWS + 1):
            linear(torch.zeros(num_rows, 2 * group_size, dtype=dtype))


if __name__ == "__main__":
    JITFunction.run = compile_instead
    dtype = getattr(torch, sys.argv[1])
    launch_everything(dtype, *map(int, sys.argv[2:]))
    kernels = {"_rms_norm", "_swiglu", "_turn_heads", "_attend", "_merge_parts"}
    kernels |= {"_multiply", "_add_parts", "_dequantize"}
    assert compiled == {f"{name} sm_{c}" for name in kernels for c in CAPABILITIES}
