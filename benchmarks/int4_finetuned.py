"""INT4 methods on SmolLM2-135M once a short finetune has moved its weights off the 4-bit grid that they came on.

    python -m benchmarks.int4_finetuned [--steps 24] [--samples 8] [--length 512]

The packaged weights come from a 4-bit GGUF, so what INT4 does to them says little of other models. A few dozen steps of
AdamW on Wikipedia summaries move every weight; then each method quantizes the result, calibrated on either of the two
corpora, always on parts that neither the finetune nor the evaluation sees.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.model import HOME, calibration_tokens, packaged_model
from benchmarks.pruning_methods import (
    GROUP_SIZE,
    MODEL_DTYPE,
    Method,
    awq_int4,
    compress_blocks,
    gptq_int4,
    nearest,
)
from compression.hf import load_model
from compression.quantization.int4 import dequantize, round_to_nearest
from compression.recipe import Calibration
from evaluation.corpora import CORPORA, STATE_OF_THE_UNION, WIKIPEDIA_SUMMARIES, load_corpus
from evaluation.perplexity import measure_perplexity, tokenize

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH, LEARNING_RATE = 2, 256, 1e-4
MAX_WINDOWS = 8
WIKI, SPEECHES = WIKIPEDIA_SUMMARIES, STATE_OF_THE_UNION
METHODS: tuple[tuple[str, Method, str], ...] = (
    ("round-to-nearest", nearest(True), ""),
    ("GPTQ", gptq_int4(True), WIKI),
    ("AWQ", awq_int4(True), WIKI),
    ("GPTQ, dampening 0.01", gptq_int4(True, 0.01), WIKI),
    ("GPTQ", gptq_int4(True), SPEECHES),
    ("AWQ", awq_int4(True), SPEECHES),
    ("round-to-nearest, asymmetric", nearest(False), ""),
    ("GPTQ, asymmetric", gptq_int4(False), WIKI),
    ("AWQ, asymmetric", awq_int4(False), WIKI),
)


def finetune(source: Path, num_steps: int) -> Any:
    """AdamW on float32 weights, products in bfloat16; on text between what is evaluated and what calibrates."""
    torch.manual_seed(0)
    model = load_model(source, dtype=torch.float32).requires_grad_(True)
    token_ids, _ = tokenize(source, load_corpus(WIKIPEDIA_SUMMARIES))
    quarter = len(token_ids) // 4
    starts = torch.randint(quarter, 2 * quarter - LENGTH, (num_steps, BATCH)).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    for step, row in enumerate(starts):
        ids_BS = torch.tensor([token_ids[start : start + LENGTH] for start in row])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids_BS, labels=ids_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        print(f"step {step + 1} of {num_steps}: loss {float(loss.detach()):.3f}", flush=True)
    return model.requires_grad_(False).to(MODEL_DTYPE)


def moved(before: Any, after: Any) -> tuple[float, float]:
    """How far the finetune moved the weights of the blocks, and how far rounding moves them: root mean squares."""
    movement, rounding, count = 0.0, 0.0, 0
    for name, module in before.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            old_OI = module.weight.float()
            new_OI = after.model.layers.get_submodule(name).weight.float()
            codes = round_to_nearest(old_OI, 64, symmetric=True, scale_dtype=MODEL_DTYPE)
            movement += float((new_OI - old_OI).square().sum())
            rounding += float((dequantize(codes) - old_OI).square().sum())
            count += old_OI.numel()
    return (movement / count) ** 0.5, (rounding / count) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    source = packaged_model("smollm2-135m", arguments.home)
    original = load_model(source, dtype=MODEL_DTYPE)
    model = finetune(source, arguments.steps)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    movement, rounding = moved(original, model)
    rows = [
        ["original", "", *perplexities(original, source)],
        ["finetuned", "", *perplexities(model, source)],
    ]
    path = RESULTS / f"int4_finetuned_smollm2-135m_{platform.machine()}_{datetime.date.today()}.md"

    def quantize(name: str, method: Method, corpus: str) -> None:
        model.load_state_dict(weights)
        batches = calibration(source, corpus, arguments) if corpus else []
        compress_blocks(model, batches, method, gram=bool(corpus))
        rows.append([name, corpus, *perplexities(model, source)])
        print(rows[-1], flush=True)
        lines = page(rows, movement, rounding, arguments)
        path.write_text("\n".join(lines) + "\n")

    for name, method, corpus in METHODS:
        quantize(name, method, corpus)


def calibration(source: Path, name: str, arguments: argparse.Namespace) -> list[Tensor]:
    settings = Calibration(corpus=name, samples=arguments.samples, length=arguments.length)
    tokens = calibration_tokens(source, settings)
    return list(torch.split(tokens.ids_NS, 4))


def perplexities(model: Any, source: Path) -> list[float]:
    return [
        measure_perplexity(model, source, load_corpus(name), max_windows=MAX_WINDOWS).value
        for name in CORPORA
    ]


def page(
    rows: list[list[Any]], movement: float, rounding: float, arguments: argparse.Namespace
) -> list[str]:
    head = ["method", "calibrated on", *(f"{name} perplexity" for name in CORPORA)]
    before = rows[1][2:]
    return [
        "# SmolLM2-135M, finetuned a little: INT4 methods",
        "",
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}.",
        f"Command: `python -m benchmarks.int4_finetuned --steps {arguments.steps} --samples {arguments.samples}"
        f" --length {arguments.length}`.",
        f"The finetune: {arguments.steps} steps of AdamW, {BATCH} x {LENGTH} tokens of wikipedia-summaries each,"
        f" learning rate {LEARNING_RATE} falling to 0. It moved the weights by {movement:.2e} (root mean"
        f" square); rounding them in groups of {GROUP_SIZE} moves them by {rounding:.2e}.",
        f"INT4: groups of {GROUP_SIZE}, symmetric unless it says otherwise. Calibration: {arguments.samples} x"
        f" {arguments.length} tokens of a corpus' second half. Perplexity: {MAX_WINDOWS} windows of 512 tokens from its"
        " beginning, stride 512, bfloat16; in brackets the ratio to the finetuned model.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *(
            f"| {name} | {corpus} | "
            + " | ".join(f"{v:.2f} ({v / b:.3f})" for v, b in zip(values, before, strict=True))
            + " |"
            for name, corpus, *values in rows
        ),
    ]


if __name__ == "__main__":
    main()
