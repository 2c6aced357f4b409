"""Calibration: which tokens a method sees, and what they make of the inputs of one block at a time.

Blocks run in order in transformers' own modules, float32; each is fed by those before it as they were compressed (as in
GPTQ, SparseGPT and Wanda). Only the hidden states between two blocks and one block's weights are in memory.

Shapes: N samples, S tokens each, H hidden channels, I input channels of a linear layer.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compression.block import Block, is_finite
from compression.checkpoint import Checkpoint
from compression.hf import build_skeleton, read_config
from compression.pruning.shortgpt import BlockInfluence
from compression.recipe import Calibration
from compression.safetensors_header import CheckpointError
from compression.statistics import InputStatistics

JsonObject = dict[str, Any]
# Blocks take (hidden states, masks and positions) and return hidden states; the layers inside have Llama's names.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS_PER_BATCH = 2048


class CalibrationError(Exception):
    """Text or model that calibration cannot work with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTokens:
    """Attributes: provenance: corpus or file, its sha256, samples, length and seed; stored with the result."""

    ids_NS: Tensor
    provenance: JsonObject


def sample_tokens(token_ids: list[int], settings: Calibration, *, sha256: str) -> CalibrationTokens:
    """Windows at random positions in the second half of a tokenized corpus, where nothing is evaluated, or in a file.

    Args:
        sha256: of the corpus or file.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    source, part = ("corpus", "second half") if settings.file is None else ("file", "whole")
    first = len(token_ids) // 2 if settings.file is None else 0
    num_starts = len(token_ids) - first - settings.length + 1
    if num_starts < 1:
        raise CalibrationError(
            f"calibration text {getattr(settings, source)} has {len(token_ids) - first} tokens in its"
            f" {part}, one sample needs {settings.length}"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    starts = torch.randint(0, num_starts, (settings.samples,), generator=generator) + first
    ids = torch.tensor(token_ids)
    ids_NS = torch.stack([ids[start : start + settings.length] for start in starts.tolist()])
    drawn = {"samples": settings.samples, "length": settings.length, "seed": settings.seed}
    provenance = {
        source: getattr(settings, source),
        **drawn,
        "part": part,
        f"{source}_sha256": sha256,
    }
    digest = hashlib.sha256(ids_NS.numpy().tobytes()).hexdigest()
    return CalibrationTokens(ids_NS=ids_NS, provenance=provenance | {"tokens_sha256": digest})


class _Capture(nn.Module):
    """Stands in for the blocks: keeps what the first of them is called with."""

    hidden_1SH: Tensor
    arguments: dict[str, Any]

    def forward(self, hidden_1SH: Tensor, **arguments: Any) -> Tensor:
        self.hidden_1SH, self.arguments = hidden_1SH, arguments
        return hidden_1SH


class BlockRunner:
    """Sends calibration tokens through the blocks of a decoder, one block at a time.

    Attributes:
        hidden_NSH: what the next block takes, float32.
    """

    hidden_NSH: Tensor

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        ids_NS: Tensor,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
            check: called before every batch; may raise to stop.

        Raises:
            CalibrationError: the architecture is not one of `ARCHITECTURES`, or samples exceed its context.
        """
        config = read_config(folder)
        architecture = config.get("model_type")
        if architecture not in ARCHITECTURES:
            raise CalibrationError(
                f"calibration knows the blocks of {', '.join(ARCHITECTURES)}, not of {architecture!r}"
            )
        context = config.get("max_position_embeddings", 0)
        if ids_NS.shape[1] > context:
            raise CalibrationError(
                f"samples of {ids_NS.shape[1]} tokens, the model takes {context}"
            )
        self._check = check
        model = build_skeleton(checkpoint, AutoModelForCausalLM, torch.float32).eval()
        self._decoder = model.model
        self._layers = list(model.model.layers)
        embedding = checkpoint.tensor("model.embed_tokens.weight").float()
        if not is_finite(embedding):
            raise CheckpointError("model.embed_tokens has weights that are not finite")
        model.model.embed_tokens.load_state_dict({"weight": embedding}, assign=True)
        self._embed(ids_NS)

    @torch.no_grad()
    def _embed(self, ids_NS: Tensor) -> None:
        capture = _Capture()
        self._decoder.layers = nn.ModuleList([capture] * len(self._layers))
        self._decoder.norm = nn.Identity()
        hidden = []
        for ids_S in ids_NS:
            self._decoder(ids_S[None], use_cache=False)
            hidden.append(capture.hidden_1SH)
        self._arguments = capture.arguments  # positions and mask: the same for all samples
        self.hidden_NSH = torch.cat(hidden)

    @torch.no_grad()
    def statistics(
        self, block: Block, *, gram: bool, advance: bool = False
    ) -> dict[str, InputStatistics]:
        """What enters each linear layer of the block. Its output is thrown away, or with `advance` taken over, which
        saves a pass where the block is to stay as it is."""
        found: dict[str, InputStatistics] = {}
        latest: list[Any] = [None, None]

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                x = arguments[0]
                if latest[0] is x:  # q, k and v read one tensor, gate and up another: counted once
                    found.setdefault(name, latest[1])
                    return
                if name not in found:
                    found[name] = InputStatistics(
                        name=f"{block.prefix}.{name}", num_channels=x.shape[-1], gram=gram
                    )
                found[name].add(x)
                latest[:] = [x, found[name]]

            return hook

        layer = self._load(block)
        handles = [
            layer.get_submodule(name).register_forward_pre_hook(watch(name))
            for name in block.linears
        ]
        try:
            start = 0
            for output in self._outputs(layer):
                if advance:
                    self.hidden_NSH[start : start + len(output)] = output
                    start += len(output)
        except ValueError as error:  # a statistic names the layer whose inputs are not finite
            raise CalibrationError(str(error)) from None
        finally:
            for handle in handles:
                handle.remove()
            layer.to("meta")
        return found

    @torch.no_grad()
    def advance(self, block: Block, influence: BlockInfluence | None = None) -> None:
        """Replace the hidden states by what the block makes of them, and measure its influence on the way."""
        layer = self._load(block)
        start = 0
        for output in self._outputs(layer):
            before = self.hidden_NSH[start : start + len(output)]
            if influence is not None:
                influence.add(block.index, before.flatten(0, 1), output.flatten(0, 1))
            before.copy_(output)
            start += len(output)
        layer.to("meta")

    @torch.no_grad()
    def _outputs(self, layer: Any) -> Any:
        batch = max(TOKENS_PER_BATCH // self.hidden_NSH.shape[1], 1)
        for hidden_BSH in torch.split(self.hidden_NSH, batch):
            self._check()
            output = layer(hidden_BSH, **self._arguments)
            yield output[0] if isinstance(output, tuple) else output

    def _load(self, block: Block) -> Any:
        layer = self._layers[block.index]
        for name, linear in block.linears.items():
            weight_OI = linear.weight
            out_features, in_features = weight_OI.shape
            bias = linear.bias_O is not None
            module = nn.Linear(in_features, out_features, bias=bias, device="meta")
            state = {"weight": weight_OI} | ({"bias": linear.bias_O} if bias else {})
            module.load_state_dict(state, assign=True)
            layer.set_submodule(name, module)
        attention = getattr(layer, "self_attn", None)
        if (
            attention is not None
        ):  # a stage may have changed how many query heads share a key-value head
            groups = attention.q_proj.out_features // attention.k_proj.out_features
            attention.num_key_value_groups = groups
        others = {name: tensor.float() for name, tensor in block.others.items()}
        result = layer.load_state_dict(others, strict=False, assign=True)
        if result.unexpected_keys:
            raise CheckpointError(f"{block.prefix}: unexpected {result.unexpected_keys}")
        return layer


def require_gram(statistics: Mapping[str, InputStatistics], name: str) -> Tensor:
    gram_II = statistics[name].gram_II
    assert gram_II is not None
    return gram_II
