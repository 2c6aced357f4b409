"""A whole pass in one native call: the decoder's layers without Python between their parts.

The same mathematics over the same weights and cache as `DecoderModel.forward`, with float32 between products where the
plain path rounds to bfloat16 all but what layers add up. Without AMX, passes of more rows than `max_rows` are faster
the plain way, whose products are torch's. A row's result does not depend on the rows beside it, nor on how its prompt
was cut into passes.

Shapes: T rows, H hidden, D head dim.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.kernels import native
from engines.kernels.cpu_attention import native_batch
from engines.kernels.cpu_linear import ANY_NUMBER, DTYPES, CpuLinear
from engines.kernels.linear import Linear
from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata
from engines.kernels.native import NativeLibrary, native_library
from engines.kernels.paged_attention import LayerCache

if TYPE_CHECKING:
    from engines.ffn_skip import FfnSkip, SkipPass
    from engines.model import DecoderLayer, DecoderModel

MAX_HEAD_DIM = 256


def build_cpu_step(model: "DecoderModel", kv_cache: Sequence[LayerCache]) -> "CpuStep | str":
    """The step for this model and cache, or why there is none."""
    library = native_library()
    if isinstance(library, str):
        return library
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if model.dtype not in DTYPES:
        return f"no native products in {model.dtype}"
    if model.config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {model.config.head_dim}, at most {MAX_HEAD_DIM}"
    linears = [linear for layer in model.layers for linear in _linears(layer)]
    other = next((linear for linear in linears if not isinstance(linear, CpuLinear)), None)
    if other is not None:
        return f"a layer runs on {other.kernel}"
    return CpuStep(model, kv_cache, library)


class CpuStep:
    """Made by `build_cpu_step`; holds no weight, only where they are.

    Attributes:
        max_rows: the longest pass that is faster this way.
    """

    def __init__(
        self, model: "DecoderModel", kv_cache: Sequence[LayerCache], library: NativeLibrary
    ) -> None:
        self._library = library
        self._dtype = model.dtype
        self.max_rows = min(
            _native(linear).native_rows for layer in model.layers for linear in _linears(layer)
        )
        self._keep: list[object] = [model, kv_cache]  # what the pointers below point into
        layers = (native.Layer * len(model.layers))(
            *(self._layer(*pair) for pair in zip(model.layers, kv_cache, strict=True))
        )
        self._model = native.Model(
            layers=layers,
            final_norm_H=self._floats(model.final_norm_H),
            cos_PR=self._floats(model.cos_PR),
            sin_PR=self._floats(model.sin_PR),
            num_layers=len(model.layers),
            hidden_size=model.config.hidden_size,
            head_dim=model.config.head_dim,
            block_size=BLOCK_SIZE,
            is_bf16=model.dtype == torch.bfloat16,
            rms_norm_epsilon=model.config.rms_norm_epsilon,
        )

        self._skip_layers = (native.SkipLayer * len(model.layers))()
        if model.ffn_skip is not None:
            for index in range(len(model.layers)):
                self._skip_layers[index] = self._skip_layer(model.ffn_skip, index)

    @property
    def kernel(self) -> str:
        """For `EngineInfo.kernels`."""
        limit = "" if self.max_rows == ANY_NUMBER else f" up to {self.max_rows} rows"
        return f"one native call{limit}: {self._library.description}"

    def forward(
        self, hidden_TH: Tensor, metadata: BatchMetadata, skip: "SkipPass | None" = None
    ) -> Tensor:
        """As `DecoderModel.forward` with a cache."""
        hidden_TH = hidden_TH.clone(memory_format=torch.contiguous_format)
        assert hidden_TH.dtype == self._dtype
        batch = native_batch(metadata)
        self._library.functions.lathe_step(
            self._library.context,
            *(ctypes.byref(self._model), ctypes.byref(batch)),
            None if skip is None else ctypes.byref(self._skip(skip)),
            hidden_TH.data_ptr(),
        )
        return hidden_TH

    def _layer(self, layer: "DecoderLayer", cache: LayerCache) -> native.Layer:
        keys, values = cache
        assert keys.is_contiguous()
        assert values.is_contiguous()
        qkv, o, gate_up, down = (_native(linear).native_linear for linear in _linears(layer))
        return native.Layer(
            input_norm_H=self._floats(layer.input_norm_H),
            post_norm_H=self._floats(layer.post_norm_H),
            query_norm_D=self._floats(layer.query_norm_D),
            key_norm_D=self._floats(layer.key_norm_D),
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
            key_cache=keys.data_ptr(),
            value_cache=values.data_ptr(),
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            window=layer.window or 0,
        )

    def _skip(self, skip: "SkipPass") -> native.Skip:
        """Valid as long as the pass is."""
        assert skip.tau_T.dtype == torch.float32
        assert skip.num_skipped_T.dtype == torch.int32
        return native.Skip(
            layers=self._skip_layers,
            tau_T=skip.tau_T.data_ptr(),
            num_skipped_T=skip.num_skipped_T.data_ptr(),
            k=skip.skip.rule.k,
        )

    def _skip_layer(self, skip: "FfnSkip", layer: int) -> native.SkipLayer:
        substitute = skip.substitutes[layer]
        one = native.SkipLayer(
            mean_H=self._floats(substitute.mean_H), is_middle=skip.rule.is_middle(layer)
        )
        if substitute.linear is not None:
            one.linear = _native(substitute.linear).native_linear
        return one

    def _floats(self, tensor: Tensor | None) -> int | None:
        """Address of a float32 version, kept alive."""
        if tensor is None:
            return None
        tensor = tensor.float().contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()


def _linears(layer: "DecoderLayer") -> tuple[Linear, Linear, Linear, Linear]:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _native(linear: Linear) -> CpuLinear:
    assert isinstance(linear, CpuLinear)
    return linear
