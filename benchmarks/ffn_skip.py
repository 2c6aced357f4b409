"""FFN-SkipLLM on a model: perplexity of every policy at equal weight traffic, recorded as Markdown.

`python -m benchmarks.ffn_skip --home LATHE_HOME` runs the calibrate_skip job by hand, with a gate that lets
everything through, and writes its report below a line that says where and with what.
"""

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from compression.import_model import import_packaged
from compression.registry import ModelNotFoundError, ModelRegistry
from evaluation.skip import to_markdown
from jobs.context import RunnerContext
from jobs.runners import calibrate_skip
from jobs.spec import parse_spec

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "lathe")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    registry = ModelRegistry(arguments.home / "models")
    try:
        source = registry.get(arguments.model)
    except ModelNotFoundError:
        import_packaged(registry, arguments.model)
        source = registry.get(arguments.model)
    spec = {
        "type": "calibrate_skip",
        "model": arguments.model,
        "output": f"{arguments.model}-skip",
        "target_ratios": [0.1, 0.2, 0.25, 0.3],
        "calibration": {"samples": arguments.samples, "length": arguments.length},
        "gate": {"max_perplexity_ratio": 1000},
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        (home / "models").mkdir()
        (home / "models" / arguments.model).symlink_to(source.path.resolve())
        (home / "job").mkdir()
        context = RunnerContext(
            job_id="benchmark",
            attempt=1,
            spec=parse_spec(spec).model_dump(mode="json", exclude_none=True),
            folder=home / "job",
            home=home,
            send=_print,
        )
        calibrate_skip.run(context)
        report = json.loads((context.artifacts / "report.json").read_text())
    seconds = time.monotonic() - started
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    today = datetime.date.today()
    title, _, table = to_markdown(f"{arguments.model}: skipping feed-forwards", report).partition(
        "\n"
    )
    where = (
        f"{today}, commit {commit}, {platform.machine()}, {torch.get_num_threads()} threads, torch"
        f" {torch.__version__}, transformers {transformers.__version__}; {seconds:.0f} s in all.\n"
        "Command: `python -m benchmarks.ffn_skip`. The model is dequantized GGUF Q4_1."
    )
    path = RESULTS / f"ffn_skip_{platform.machine()}_{today}.md"
    path.write_text(f"{title}\n\n{where}\n{table}")
    print(path.read_text())


def _print(message: dict[str, Any]) -> None:
    if "message" in message:
        print(message["message"], flush=True)


if __name__ == "__main__":
    main()
