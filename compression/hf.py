"""Builds a transformers model from any Lathe checkpoint. INT4 layers stay packed in memory.

transformers' modules are the truth for compression, evaluation and training, and the oracle of every engine.
Remote code is never run: `trust_remote_code` is False wherever transformers asks.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from compression.checkpoint import Checkpoint, Int4Linear, open_checkpoint
from compression.linear import build_int4_linear
from compression.quantization.int4 import from_tensors

FINGERPRINT_TOKENS = 16
FINGERPRINT_LOGITS = 8


def load_model(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Any:
    """A model in eval mode, without gradients; encoders give `AutoModel`, decoders `AutoModelForCausalLM`.

    Raises:
        CheckpointError: the files are not what the manifest promises.
    """
    checkpoint = open_checkpoint(folder)
    device = torch.device(device)
    auto_class = AutoModel if checkpoint.manifest.kind == "encoder" else AutoModelForCausalLM
    int4 = {m.name: m.linear for m in checkpoint.manifest.matrices if m.linear.kind == "int4"}
    if not int4:
        model = auto_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    else:
        model = _build(folder, auto_class, dtype)
        _fill(model, checkpoint, dtype, device)
    return model.to(device).eval().requires_grad_(False)


def _build(folder: Path, auto_class: Any, dtype: torch.dtype) -> nn.Module:
    """Modules with untouched memory: pages that nothing writes to are never resident."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # ours to read, not transformers'
    with _no_initialisation():
        model: nn.Module = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    return model


def _no_initialisation() -> Any:
    from transformers.initialization import no_init_weights

    return no_init_weights()


def _fill(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the checkpoint's tensors in, replacing each INT4 layer by a module that keeps it packed."""
    remaining = set(checkpoint.manifest.promised_tensors())
    for matrix in checkpoint.manifest.matrices:
        if not isinstance(matrix.linear, Int4Linear):
            continue
        suffixes = list(matrix.linear.tensors())
        names = [f"{matrix.name}.{suffix}" for suffix in suffixes]
        stored = {name.rpartition(".")[2]: tensor for name, tensor in checkpoint.tensors(names)}
        bias = stored.pop("bias", None)
        module = build_int4_linear(
            from_tensors(stored),
            None if bias is None else bias.to(dtype),
            dtype=dtype,
            device=device,
        )
        model.set_submodule(matrix.name, module)
        remaining -= set(names)
    dense: dict[str, Tensor] = {n: t.to(dtype) for n, t in checkpoint.tensors(sorted(remaining))}
    result = model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    expected = {
        n for n, p in model.named_parameters() if n.rpartition(".")[0] not in _int4(checkpoint)
    }
    missing = expected - dense.keys() - _tied(model)
    if result.unexpected_keys or missing:
        raise RuntimeError(f"unexpected {result.unexpected_keys}, missing {sorted(missing)}")


def _int4(checkpoint: Checkpoint) -> set[str]:
    return {m.name for m in checkpoint.manifest.matrices if m.linear.kind == "int4"}


def _tied(model: nn.Module) -> set[str]:
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    return set(keys)


def cache_keyword(model: nn.Module) -> str:
    """What the model's forward calls its key/value cache; transformers 5.24 renamed it."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def kernels(model: nn.Module) -> dict[str, str]:
    """Kernel name to the number of layers that use it."""
    counts: dict[str, int] = {}
    for module in model.modules():
        name = getattr(module, "kernel", None)
        if isinstance(name, str):
            counts[name] = counts.get(name, 0) + 1
        elif isinstance(module, nn.Linear):
            key = f"linear: torch {str(module.weight.dtype).removeprefix('torch.')}"
            counts[key] = counts.get(key, 0) + 1
    return {name: f"{count} layers" for name, count in counts.items()}


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as held, shared storage counted once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.inference_mode()
def fingerprint(model: Any) -> dict[str, Any]:
    """Fixed token ids and the float32 logits that they give at the last position.

    Kept in the manifest and compared within a tolerance, so that a load that silently went wrong shows.
    """
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    token_ids = [(7919 * (i + 1)) % vocab_size for i in range(FINGERPRINT_TOKENS)]
    output = model(torch.tensor([token_ids], device=model.device))
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output.last_hidden_state
    values = logits[0, -1, :FINGERPRINT_LOGITS].float()
    scale = float(logits[0, -1].float().std())
    return {"token_ids": token_ids, "logits": [round(float(v), 4) for v in values], "scale": scale}


def check_fingerprint(model: Any, expected: dict[str, Any], *, tolerance: float = 0.05) -> float:
    """Largest difference of the fingerprint's logits, in units of the logits' spread.

    Raises:
        CheckpointError: it exceeds the tolerance.
    """
    from compression.safetensors_header import CheckpointError

    actual = fingerprint(model)
    difference: float = max(
        abs(a - b) for a, b in zip(actual["logits"], expected["logits"], strict=True)
    ) / max(expected["scale"], 1e-6)
    if actual["token_ids"] != expected["token_ids"] or difference > tolerance:
        raise CheckpointError(
            f"logits differ from the manifest's by {difference:.3f} of their spread"
        )
    return difference


def read_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config
