"""One method of llm-compressor on a checkpoint, as one JSON line; `compression_peers.py` runs it in a venv of its own.

    PEER/bin/python -m benchmarks.llmcompressor_peer METHOD CHECKPOINT TOKENS OUTPUT

METHOD is a key of `RECIPES`. TOKENS is a JSON list of lists of token ids, what the method is calibrated with. OUTPUT
becomes a folder with the weights that the method left, dense (INT4 as its codes stand for), for our own measurement.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# The pruning modifiers look for "lm_head." with its dot; "lm_head" alone lets them prune the tied embedding.
LINEAR = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
GROUP_SIZE = 64


def int4(*, symmetric: bool) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": GROUP_SIZE,
    }
    group = {"targets": ["Linear"], "weights": weights}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


RECIPES: dict[str, Callable[[], list[Any]]] = {
    "rtn": lambda: [QuantizationModifier(**int4(symmetric=True))],
    "gptq": lambda: [GPTQModifier(**int4(symmetric=True))],
    "awq": lambda: [AWQModifier(), QuantizationModifier(**int4(symmetric=True))],
    "rtn asymmetric": lambda: [QuantizationModifier(**int4(symmetric=False))],
    "gptq asymmetric": lambda: [GPTQModifier(**int4(symmetric=False))],
    "awq asymmetric": lambda: [AWQModifier(), QuantizationModifier(**int4(symmetric=False))],
    "wanda": lambda: [WandaPruningModifier(sparsity=0.5, **LINEAR)],
    "wanda 2:4": lambda: [WandaPruningModifier(sparsity=0.5, mask_structure="2:4", **LINEAR)],
    "sparsegpt": lambda: [SparseGPTModifier(sparsity=0.5, **LINEAR)],
    "sparsegpt 2:4": lambda: [SparseGPTModifier(sparsity=0.5, mask_structure="2:4", **LINEAR)],
}


def dense_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name as the forward pass uses them: quantized ones are rounded to their codes."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    weights = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter):
            continue
        scheme = getattr(module, "quantization_scheme", None)
        data = weight.detach()
        if scheme is not None and scheme.weights is not None:
            data = forward_quantize(module, data, "weight", scheme.weights)
        weights[f"{name}.weight"] = data.contiguous().clone()
    return weights


def main() -> None:
    method, checkpoint, tokens, output = sys.argv[1:]
    ids = json.loads(Path(tokens).read_text())
    torch.manual_seed(0)
    if not torch.accelerator.is_available():  # 0.14's AWQ pins memory, which nothing but a GPU can
        IntermediatesCache.pin_memory = lambda *_: None
    before = cpu_seconds()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        dataset=data,
        recipe=RECIPES[method](),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        pipeline="datafree" if method.startswith("rtn") else "sequential",
    )
    cost = {"cpu_seconds": cpu_seconds() - before, "peak_mib": peak_mib()}
    Path(output).mkdir()
    with torch.no_grad():
        save_file(dense_weights(model), Path(output) / "weights.safetensors")
    print(json.dumps(cost))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mib() -> float:
    """Not ru_maxrss: a child inherits the parent's there."""
    status = Path("/proc/self/status").read_text()
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peak) / 1024


if __name__ == "__main__":
    main()
