"""A training step of train_projector with plain and with torch's fused attention, interleaved, on the CPU.

    python -m benchmarks.projector_attention --model DIR

DIR is a checkpoint as `lathe pull` leaves it. Batches of 16 questions of two centres; the number of rows a centre tells
the template. Prints one JSON line per shape: seconds of a step, medians.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import interleaved
from compression.hf import load_model
from training.projector import FrozenReader, Projector, TaskPrompt

BATCH_SIZE = 16
WIDTH = 384
ROWS = {"ho, 4 hops": 5, "nd, 2 hops of 3": 13, "nd, 2 hops of 10": 111}
PROMPT = TaskPrompt(before=tuple(range(100, 125)), after=((5, 6, 7, 8), (9, 10, 11)))
ANSWERS = [(20, 2)] * BATCH_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    model = load_model(options.model, dtype=getattr(torch, options.dtype))
    reader = FrozenReader(model)
    projector = Projector(WIDTH, reader.hidden_size, num_layers=1)

    def step_with(attention: str, num_rows: int) -> None:
        model.set_attn_implementation(attention)
        step(reader, projector, num_rows)

    for name, num_rows in ROWS.items():
        steps = {kind: partial(step_with, kind, num_rows) for kind in ("eager", "sdpa")}
        plain, fused = interleaved(steps, options.repeats).values()
        shown = {"plain": round(plain, 3), "fused": round(fused, 3), "ratio": fused / plain}
        print(json.dumps({"template": name, "dtype": options.dtype, **shown}), flush=True)


def step(reader: FrozenReader, projector: Projector, num_rows: int) -> None:
    vectors = torch.randn(BATCH_SIZE, 2, num_rows, WIDTH)
    rows = projector(vectors, torch.zeros(vectors.shape[:-1], dtype=torch.bool))
    projector.zero_grad()
    reader.loss(PROMPT, rows, ANSWERS).backward()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
