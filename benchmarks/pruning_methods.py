"""Pruning and INT4 methods side by side on SmolLM2-135M: perplexity after each, and the seconds it took; as Markdown.

Blocks are compressed in order. Statistics come from the outputs of the blocks before, compressed already; within a
block from its dense weights. The model computes in bfloat16, the methods in float32.
"""

import argparse
import datetime
import gzip
import hashlib
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.model import packaged_model
from compression.hf import load_model
from compression.pruning.magnitude import magnitude_keep_mask
from compression.pruning.masks import NM, Sparsity
from compression.pruning.sparsegpt import sparsegpt
from compression.pruning.wanda import wanda_keep_mask
from compression.quantization.awq import divide_outputs, search_scale, value_sources
from compression.quantization.gptq import DAMPENING, gptq
from compression.quantization.int4 import dequantize, round_to_nearest
from compression.quantization.ranges import round_in_best_range
from compression.statistics import InputStatistics
from evaluation.corpora import (
    STATE_OF_THE_UNION,
    WIKIPEDIA_SUMMARIES,
    Corpus,
    load_corpus,
)
from evaluation.perplexity import measure_perplexity, tokenize

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 64
MODEL_DTYPE = torch.bfloat16
WINDOW = 512
MAX_WINDOWS = 8
EVALUATION_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One tensor that linear layers of a block read, and what produces it."""

    readers: list[nn.Linear]
    producer: nn.Module
    source_I: Tensor | None
    statistics: InputStatistics


Method = Callable[[list[Input]], None]


def block_inputs(block: Any, config: Any, *, gram: bool) -> list[Input]:
    attention, mlp = block.self_attn, block.mlp
    sources_I = value_sources(
        config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    )
    rows: list[tuple[list[nn.Linear], nn.Module, Tensor | None]] = [
        ([attention.q_proj, attention.k_proj, attention.v_proj], block.input_layernorm, None),
        ([attention.o_proj], attention.v_proj, sources_I),
        ([mlp.gate_proj, mlp.up_proj], block.post_attention_layernorm, None),
        ([mlp.down_proj], mlp.up_proj, None),
    ]
    return [
        Input(
            readers=readers,
            producer=producer,
            source_I=source_I,
            statistics=InputStatistics(
                name="input", num_channels=readers[0].in_features, gram=gram
            ),
        )
        for readers, producer, source_I in rows
    ]


def replace_weights(inputs: list[Input], new_weight: Callable[[Tensor, Input], Tensor]) -> None:
    for entry in inputs:
        for linear in entry.readers:
            linear.weight.data = new_weight(linear.weight.data, entry).to(MODEL_DTYPE)


def magnitude(sparsity: Sparsity) -> Method:
    return lambda inputs: replace_weights(
        inputs, lambda weight_OI, _: weight_OI * magnitude_keep_mask(weight_OI, sparsity)
    )


def wanda(sparsity: Sparsity) -> Method:
    return lambda inputs: replace_weights(
        inputs,
        lambda weight_OI, entry: (
            weight_OI * wanda_keep_mask(weight_OI, entry.statistics.norm, sparsity)
        ),
    )


def sparse_gpt(sparsity: Sparsity) -> Method:
    return lambda inputs: replace_weights(
        inputs, lambda weight_OI, entry: sparsegpt(weight_OI, gram_of(entry), sparsity)
    )


def nearest(symmetric: bool) -> Method:
    return lambda inputs: replace_weights(
        inputs,
        lambda weight_OI, _: dequantize(
            round_to_nearest(weight_OI, GROUP_SIZE, symmetric=symmetric, scale_dtype=MODEL_DTYPE)
        ),
    )


def gptq_int4(symmetric: bool, dampening: float = DAMPENING) -> Method:
    return lambda inputs: replace_weights(
        inputs,
        lambda weight_OI, entry: dequantize(
            gptq(
                weight_OI,
                gram_of(entry),
                GROUP_SIZE,
                symmetric=symmetric,
                scale_dtype=MODEL_DTYPE,
                dampening=dampening,
            )
        ),
    )


def awq_int4(symmetric: bool) -> Method:
    def compress(inputs: list[Input]) -> None:
        scales = {}
        for entry in inputs:
            found = search_scale(
                [linear.weight.data for linear in entry.readers],
                gram_of(entry),
                entry.statistics.mean_abs_I,
                GROUP_SIZE,
                symmetric=symmetric,
                scale_dtype=MODEL_DTYPE,
                source_I=entry.source_I,
            )
            for linear in entry.readers:  # float32 until they are rounded
                linear.weight.data = linear.weight.data * found.scale_I
            for parameter in entry.producer.parameters():
                parameter.data = divide_outputs(parameter.data, found.scale_S)
            scales[id(entry)] = found.scale_I
        replace_weights(
            inputs,
            lambda weight_OI, entry: dequantize(
                round_in_best_range(
                    weight_OI,
                    gram_of(entry).diagonal() / scales[id(entry)].square(),
                    GROUP_SIZE,
                    symmetric=symmetric,
                    scale_dtype=MODEL_DTYPE,
                )
            ),
        )

    return compress


def gram_of(entry: Input) -> Tensor:
    assert entry.statistics.gram_II is not None
    return entry.statistics.gram_II


SPARSITIES: dict[str, Sparsity] = {"30 %": 0.3, "50 %": 0.5, "60 %": 0.6, "2:4": NM(2, 4)}
METHODS: dict[str, Method] = {
    **{
        f"{name} {label}": make(sparsity)
        for label, sparsity in SPARSITIES.items()
        for name, make in (("magnitude", magnitude), ("Wanda", wanda), ("SparseGPT", sparse_gpt))
    },
    **{
        f"INT4 {name}, {'symmetric' if symmetric else 'asymmetric'}": method
        for symmetric in (True, False)
        for name, method in (
            ("round-to-nearest", nearest(symmetric)),
            ("GPTQ", gptq_int4(symmetric)),
            ("AWQ", awq_int4(symmetric)),
        )
    },
}


NEED_GRAM = {name for name in METHODS if any(m in name for m in ("SparseGPT", "GPTQ", "AWQ"))}


class _FirstBlockReachedError(Exception):
    pass


def first_block_arguments(model: Any, ids_BS: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states that enter the first block, and what else it is called with."""
    captured: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        captured.append((args[0], kwargs))
        raise _FirstBlockReachedError

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(ids_BS, use_cache=False)
    except _FirstBlockReachedError:
        pass
    finally:
        handle.remove()
    return captured[0]


@torch.inference_mode()
def compress_blocks(model: Any, batches: list[Tensor], method: Method, *, gram: bool) -> float:
    """Returns the seconds spent in the method itself."""
    calls = [first_block_arguments(model, ids_BS) for ids_BS in batches]
    hidden = [hidden_BSH for hidden_BSH, _ in calls]
    seconds = 0.0
    for block in model.model.layers:
        inputs = block_inputs(block, model.config, gram=gram)
        handles = [
            entry.readers[0].register_forward_pre_hook(
                lambda _, args, entry=entry: entry.statistics.add(args[0])
            )
            for entry in inputs
        ]
        for hidden_BSH, (_, kwargs) in zip(hidden, calls, strict=True):
            block(hidden_BSH, **kwargs)
        for handle in handles:
            handle.remove()
        start = time.perf_counter()
        method(inputs)
        seconds += time.perf_counter() - start
        hidden = [block(h_BSH, **kwargs) for h_BSH, (_, kwargs) in zip(hidden, calls, strict=True)]
    return seconds


def calibration_batches(source: Path, corpus: Corpus, options: argparse.Namespace) -> list[Tensor]:
    """Windows drawn with seed 0."""
    token_ids, _ = tokenize(source, corpus)
    generator = torch.Generator().manual_seed(0)
    high = len(token_ids) - options.length
    starts = torch.randint(high, (options.samples,), generator=generator).tolist()
    ids_NS = torch.tensor([token_ids[start : start + options.length] for start in starts])
    return list(torch.split(ids_NS, 8))


def part(name: str, text: str) -> Corpus:
    return Corpus(name=name, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


def load_texts(path: Path | None) -> tuple[Corpus, list[Corpus]]:
    """What to calibrate on and what to measure on."""
    corpora = [load_corpus(STATE_OF_THE_UNION)]
    if path is None:
        return load_corpus(WIKIPEDIA_SUMMARIES), corpora
    text = gzip.decompress(path.read_bytes()).decode()
    name = path.name.partition(".")[0]
    corpora.append(part(f"{name}, beginning", text[:EVALUATION_CHARACTERS]))
    return part(f"{name}, the rest", text[EVALUATION_CHARACTERS:]), corpora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--text", type=Path, help="a .txt.gz to measure on, and calibrate on the rest of"
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    options = parser.parse_args()
    source = packaged_model("smollm2-135m")
    calibration, corpora = load_texts(options.text)
    batches = calibration_batches(source, calibration, options)
    model = load_model(source, dtype=MODEL_DTYPE)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def perplexities() -> list[float]:
        return [
            measure_perplexity(
                model, source, corpus, window=WINDOW, stride=WINDOW, max_windows=MAX_WINDOWS
            ).value
            for corpus in corpora
        ]

    original = perplexities()
    lines = [
        "# SmolLM2-135M: pruning and INT4 methods",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, transformers {transformers.__version__}. Command:"
        f" `python -m benchmarks.pruning_methods --samples {options.samples} --length {options.length}"
        f"{' --text FILE' if options.text else ''}`.",
        "The original is dequantized GGUF Q4_1, so it lies on a 4-bit grid already: the loss of INT4 is flattered.",
        f"Calibration: {calibration.name} (sha256 {calibration.sha256[:12]}), {options.samples} samples of"
        f" {options.length} tokens, seed 0. Perplexity: {MAX_WINDOWS} windows of {WINDOW} tokens, stride {WINDOW},"
        " bfloat16; in brackets the ratio to the original. All seven linears of every block; INT4 in groups of"
        f" {GROUP_SIZE}. Seconds: in the method itself, all blocks, on a machine that others used too.",
        "",
        "| method | " + " | ".join(corpus.name for corpus in corpora) + " | seconds |",
        "|---|" + "---|" * (len(corpora) + 1),
        "| original | " + " | ".join(f"{value:.2f}" for value in original) + " | |",
    ]
    print("\n".join(lines), flush=True)
    path = RESULTS / f"pruning_methods_smollm2-135m_{platform.machine()}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    for name, method in METHODS.items():
        if options.only not in name:
            continue
        model.load_state_dict(dense)
        seconds = compress_blocks(model, batches, method, gram=name in NEED_GRAM)
        figures = [
            f"{value:.2f} ({value / before:.2f})"
            for value, before in zip(perplexities(), original, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(figures)} | {seconds:.1f} |")
        print(lines[-1], flush=True)
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
