"""Prompts in one pass: with our own attention, with torch's over gathered blocks, and by transformers; interleaved.

    python -m benchmarks.prefill_attention --model DIR

DIR is a checkpoint as `lathe pull` leaves it. For CPUs whose long passes run torch's products (docs/kernels.md). Each
pass ends with the logits of its last token. Prints one JSON line per length: milliseconds, medians, and ratios to ours.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import interleaved
from compression.hf import load_model
from engines.kernels.metadata import BLOCK_SIZE, RequestRows, build_metadata
from engines.kernels.ops import TORCH_OPS, Ops
from engines.model import DecoderModel, build_kv_cache, load_decoder


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[48, 128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    decoder = load_decoder(options.model, dtype=dtype)
    ours = decoder.ops
    if ours.attention is TORCH_OPS.attention:
        raise SystemExit(ours.kernels["attention"])
    reference = load_model(options.model, dtype=dtype)
    for length in options.lengths:
        ids_T = torch.randint(decoder.config.vocab_size, (length,))

        def theirs(ids_T: torch.Tensor = ids_T) -> None:
            reference(ids_T[None], use_cache=True, logits_to_keep=1)

        taken = interleaved(
            {
                "native": prefill(decoder, ours, ids_T),
                "torch": prefill(decoder, TORCH_OPS, ids_T),
                "transformers": theirs,
            },
            options.repeats,
        )
        shown = {name: round(1e3 * seconds, 1) for name, seconds in taken.items()}
        ratios = {f"{name} / native": round(taken[name] / taken["native"], 2) for name in taken}
        del ratios["native / native"]
        facts = {"tokens": length, "dtype": options.dtype, "threads": options.threads}
        print(json.dumps({**facts, "ms": shown, **ratios}), flush=True)


def prefill(decoder: DecoderModel, ops: Ops, ids_T: torch.Tensor) -> Callable[[], None]:
    num_blocks = -(-len(ids_T) // BLOCK_SIZE)
    cache = build_kv_cache(decoder, num_blocks)
    request = RequestRows(start=0, num_tokens=len(ids_T), block_table=range(num_blocks))
    metadata = build_metadata([request], decoder.device)

    def run() -> None:
        decoder.ops = ops
        decoder.logits(decoder.forward(decoder.embed(ids_T), metadata, cache)[-1:])

    return run


if __name__ == "__main__":
    main()
