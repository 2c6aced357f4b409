"""INT4 beside the original: perplexity on two corpora, bytes and speed in one run; recorded as Markdown."""

import datetime
import platform
import tempfile
from pathlib import Path

import torch
import transformers

from compression.hf import load_model, resident_bytes
from compression.import_model import import_packaged
from compression.pipeline import compress
from compression.recipe import parse_recipe
from compression.registry import ModelNotFoundError, ModelRegistry
from evaluation.corpora import CORPORA, load_corpus
from evaluation.perplexity import measure_perplexity
from evaluation.speed import compare_speed

RESULTS = Path(__file__).parent / "results"
RECIPES = {
    f"int4 g{group} {'sym' if symmetric else 'asym'}": {"group_size": group, "symmetric": symmetric}
    for group in (32, 64)
    for symmetric in (True, False)
}


def main() -> None:
    registry = ModelRegistry(Path.home() / ".cache" / "lathe" / "models")
    try:
        source = registry.get("smollm2-135m").path
    except ModelNotFoundError:
        import_packaged(registry, "smollm2-135m")
        source = registry.get("smollm2-135m").path
    with tempfile.TemporaryDirectory() as temporary:
        models = {"bf16": load_model(source)}
        for name, options in RECIPES.items():
            folder = Path(temporary) / name.replace(" ", "-")
            compress(source, folder, parse_recipe([{"int4": options}]), source_id="smollm2-135m")
            models[name] = load_model(folder)
        speeds = compare_speed(models, rounds=5)
        lines = [
            "# SmolLM2-135M: INT4 round-to-nearest beside bfloat16",
            "",
            f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads,"
            f" torch {torch.__version__}, transformers {transformers.__version__}.",
            "Command: `make bench`. The original is dequantized GGUF Q4_1, so it lies on a 4-bit grid already.",
            "",
            "| model | resident MB | "
            + " | ".join(f"{c} ppl" for c in CORPORA)
            + " | decode | prefill |",
            "|---|---|" + "---|" * len(CORPORA) + "---|---|",
        ]
        for name, model in models.items():
            figures = [
                f"{measure_perplexity(model, source, load_corpus(corpus), max_windows=16).value:.2f}"
                for corpus in CORPORA
            ]
            decode = speeds[name].decode_tokens_per_second / speeds["bf16"].decode_tokens_per_second
            prefill = (
                speeds[name].prefill_tokens_per_second / speeds["bf16"].prefill_tokens_per_second
            )
            cells = [
                name,
                f"{resident_bytes(model) / 1e6:.0f}",
                *figures,
                f"{decode:.2f}x",
                f"{prefill:.2f}x",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Perplexity: 16 windows of 512 tokens, stride 512. Speed: transformers' modules, batch 1, 128 prompt tokens,"
        " 24 new, medians of 5 interleaved rounds, as a ratio to bfloat16.",
    ]
    path = RESULTS / f"int4_smollm2-135m_{platform.machine()}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
