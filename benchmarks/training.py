"""Finetuning methods side by side on SmolLM2-135M: held-out loss, memory by part and speed, in one run; recorded as
Markdown.

    python -m benchmarks.training [--part dense low_rank pretrain step_time] [--steps 24] [--batch 2] [--length 256]

`dense` trains the model on the State of the Union speeches by every method, and by galore-torch and peft with torch's
own AdamW on the same rows; `low_rank` does so after WeLore at 50 %; `pretrain` starts from random weights in GaLore's
shapes and reads Wikipedia summaries, none of them twice; `step_time` runs steps of GaLore and Q-GaLore in turns. Rows
are kept in a JSON file beside the page, so parts can be run one by one, and a run that is stopped leaves what it
measured.
"""

import argparse
import datetime
import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.model import HOME, calibration_tokens, packaged_model
from compression.checkpoint import read_manifest
from compression.hf import load_model
from compression.import_model import import_folder
from compression.pipeline import compress
from compression.recipe import Calibration, parse_recipe
from compression.registry import ModelRegistry
from engines.process import set_torch_environment
from evaluation.corpora import load_corpus
from training.batches import Batch, collate, total_loss
from training.data import Encoded, pack_rows, read_examples
from training.methods import prepare
from training.spec import FinetuneSettings, parse_settings
from training.trainer import Hooks, StepMetrics, build_encoder, finetune, learning_rate_at

MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results"
PARTS = ("dense", "low_rank", "pretrain", "step_time")
CPU = torch.device("cpu")
RANK = 128
# (hidden, feed-forward, heads, layers), of which "60m" is GaLore's; "toy" is what a CPU does in minutes.
SHAPES = {"toy": (128, 344, 4, 4), "60m": (512, 1376, 8, 8)}
HELD_OUT_EVERY = 40
Row = dict[str, Any]
Data = tuple[Path, Path]


def methods(part: str) -> dict[str, Row]:
    """Settings by the name of their row. Learning rates were chosen once, by the scale of each method's steps."""
    projected = {"rank": RANK, "refresh_interval": 8}
    lora = {"method": {"lora": {}}, "learning_rate": 3e-4}
    if part == "dense":
        return {
            "full AdamW": {"method": "full", "learning_rate": 5e-5},
            "GaLore": {"method": {"galore": projected}, "learning_rate": 5e-5},
            "Q-GaLore": {"method": {"qgalore": projected}, "learning_rate": 5e-5},
            "LoRA": lora,
            "QLoRA (NF4)": {"method": {"qlora": {}}, "learning_rate": 3e-4},
        }
    if part == "low_rank":
        return {
            "LRC-only": {"method": "lrc_only", "learning_rate": 2e-4},
            "LoRA on the factors": lora,
            "LRC-only + Q-GaLore": {
                "method": {"lrc_only_qgalore": projected},
                "learning_rate": 2e-4,
            },
        }
    scale = {"rank": 32, "scale": 1.0, "refresh_interval": 10}
    return {
        "full AdamW": {"method": "full", "learning_rate": 3e-3},
        "GaLore": {"method": {"galore": scale}, "learning_rate": 6e-3},
        "Q-GaLore, fixed refresh": {
            "method": {"qgalore": {**scale, "lazy": False}},
            "learning_rate": 6e-3,
        },
        "Q-GaLore": {"method": {"qgalore": scale}, "learning_rate": 6e-3},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="*", default=[], help="Rows of these names.")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    arguments = parser.parse_args()
    source = packaged_model(MODEL, arguments.home)
    work = arguments.home / "training-benchmark"
    work.mkdir(exist_ok=True)
    runs = Runs(arguments, source, work)
    for part in arguments.part:
        getattr(runs, part)()


class Runs:
    """The parts, and what they share: data, arguments, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace, source: Path, work: Path) -> None:
        self.arguments, self.source, self.work = arguments, source, work
        self.speeches = write_speeches(work)
        stem = f"training_{MODEL}_{platform.machine()}_{datetime.date.today()}"
        self.path = RESULTS / f"{stem}.md"
        self.json_path = RESULTS / f"{stem}.json"

    def record(self, part: str, row: Row) -> None:
        rows: dict[str, list[Row]] = {part: [] for part in PARTS}
        if self.json_path.is_file():  # read anew: another run may have added to it
            rows |= json.loads(self.json_path.read_text())
        rows[part] = [kept for kept in rows[part] if kept["name"] != row["name"]] + [row]
        self.json_path.write_text(json.dumps(rows, indent=1) + "\n")
        self.path.write_text("\n".join(page(rows)) + "\n")
        shown = {key: value for key, value in row.items() if key != "losses"}
        print(part, json.dumps(shown), flush=True)

    def wanted(self, name: str) -> bool:
        return not self.arguments.only or name in self.arguments.only

    def settings(self, options: Row, **changes: Any) -> FinetuneSettings:
        shared = {
            "max_steps": self.arguments.steps,
            "batch_size": self.arguments.batch,
            "max_length": self.arguments.length,
            "dtype": self.arguments.dtype,
            "checkpoint_every": 10**6,
        }
        return parse_settings({**shared, **changes, **options})

    def run(
        self, part: str, name: str, source: Path, settings: FinetuneSettings, data: Data
    ) -> None:
        if not self.wanted(name):
            return
        output, work = self.work / "output", self.work / "run"
        for folder in (output, work):
            shutil.rmtree(folder, ignore_errors=True)

        def show(metrics: StepMetrics) -> None:
            rate = f"{metrics.tokens_per_second:.0f} tokens/s"
            print(f"{name}: {metrics.step}/{metrics.total} {metrics.loss:.4f} {rate}", flush=True)

        report = finetune(
            source,
            output,
            work,
            settings=settings,
            train=data[0],
            evaluation=data[1],
            source_id=MODEL,
            hooks=Hooks(on_metrics=show),
        )
        self.record(
            part,
            {
                "name": name,
                "losses": report.losses,
                "before": report.evaluations[0][1],
                "after": report.evaluations[-1][1],
                "tokens_per_second": report.tokens_per_second,
                "num_tokens": report.num_tokens,
                "refreshes": report.refreshes,
                "refreshes_fixed": report.refreshes_fixed,
                "predicted": report.predicted.to_json(),
                "measured": report.measured.to_json(),
                "settings": settings.to_json(),
            },
        )

    def dense(self) -> None:
        for name, options in methods("dense").items():
            self.run("dense", name, self.source, self.settings(options), self.speeches)
        if self.wanted("galore-torch"):
            self.peer("galore-torch", self.settings(methods("dense")["GaLore"]), galore_torch)
        if self.wanted("peft"):
            self.peer("peft", self.settings(methods("dense")["LoRA"]), peft_lora)

    def peer(self, name: str, settings: FinetuneSettings, build: Callable[..., Any]) -> None:
        """Another library's optimizer or adapters on the rows that our runs have, in a plain loop."""
        rows, held_out = (self.batches(path, settings) for path in self.speeches)
        torch.manual_seed(settings.seed)
        model = load_model(self.source, dtype=torch.float32)
        optimizer = build(model, settings)
        before, losses, num_tokens = evaluate(model, held_out), [], 0
        started = time.monotonic()
        for number in range(self.arguments.steps):
            batch = rows[number % len(rows)]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(number, self.arguments.steps, settings)
            loss = total_loss(model, batch) / batch.num_learnt
            loss.backward()  # type: ignore[no-untyped-call]
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((number + 1, float(loss.detach())))
            num_tokens += batch.num_tokens
            print(f"{name}: {number + 1}/{self.arguments.steps} {losses[-1][1]:.4f}", flush=True)
        seconds = time.monotonic() - started
        state = [
            t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
        ]
        projectors = [
            s["projector"].ortho_matrix for s in optimizer.state.values() if "projector" in s
        ]
        self.record(
            "dense",
            {
                "name": name,
                "losses": losses,
                "before": before,
                "after": evaluate(model, held_out),
                "tokens_per_second": num_tokens / seconds,
                "num_tokens": num_tokens,
                "measured": {
                    "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
                    "gradients": sum(p.numel() * p.element_size() for p in trained),
                    "optimizer": sum(t.numel() * t.element_size() for t in state),
                    "projections": sum(t.numel() * t.element_size() for t in projectors),
                },
            },
        )

    def batches(self, path: Path, settings: FinetuneSettings) -> list[Batch]:
        encoder = build_encoder(self.source, settings.max_length)
        pieces: list[Encoded] = [piece for e in read_examples(path) for piece in encoder(e)]
        rows = pack_rows(pieces, settings.max_length, packing=True)
        size = settings.batch_size
        return [collate(rows[i : i + size], CPU) for i in range(0, len(rows), size)]

    def low_rank(self) -> None:
        folder = self.work / "low-rank"
        if not (folder / "lathe.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            settings = Calibration(samples=8, length=256)
            tokens = calibration_tokens(self.source, settings)
            stage = {"err": 0.5, "count": "all", "calibration": "activation"}
            recipe = parse_recipe([{"welore": stage}])
            compress(self.source, folder, recipe, source_id=MODEL, calibration=tokens)
        for name, options in methods("low_rank").items():
            self.run("low_rank", name, folder, self.settings(options), self.speeches)

    def pretrain(self) -> None:
        folder = self.work / f"random-{self.arguments.shape}"
        if not folder.is_dir():
            random_model(folder, self.source, SHAPES[self.arguments.shape])
        summaries = write_summaries(self.work)
        steps = {"max_steps": self.arguments.pretrain_steps, "batch_size": 8, "max_length": 64}
        for name, options in methods("pretrain").items():
            settings = self.settings(options, **steps)
            self.run("pretrain", name, folder / "models" / "random", settings, summaries)

    def step_time(self) -> None:
        """Rounds of one step each, in turns, so that a busy neighbour slows both alike."""
        runs = {}
        for name in ("GaLore", "Q-GaLore"):
            settings = self.settings(methods("dense")[name], batch_size=4)
            manifest = read_manifest(self.source)
            model = load_model(self.source, dtype=torch.float32)
            trained = prepare(model, manifest, settings)
            model.train()
            runs[name] = (model, trained.build_optimizer(settings))
        batch = self.batches(self.speeches[0], self.settings({"method": "full"}, batch_size=4))[0]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(4):
            for name, (model, optimizer) in runs.items():
                started = time.process_time()
                optimizer.start_step(number, 1e-5)
                loss = total_loss(model, batch) / batch.num_learnt
                optimizer.backward(loss, last=True)
                optimizer.finish_step()
                if number:  # the first finds bases
                    seconds[name].append(time.process_time() - started)
                print(f"{name}: step {number} {time.process_time() - started:.2f} s", flush=True)
        for name, found in seconds.items():
            row = {
                "name": name,
                "seconds": statistics.median(found),
                "num_tokens": batch.num_tokens,
            }
            self.record("step_time", row)


def write_speeches(work: Path) -> Data:
    """The speeches cut in two at nine tenths, as text examples of a paragraph each."""
    text = load_corpus("state-of-the-union").text
    paragraphs = [part.strip() for part in text.split("\n") if part.strip()]
    if len(paragraphs) < 20:  # one line per speech: cut at sentences
        sentences = text.replace("\n", " ").split(". ")
        paragraphs = [". ".join(sentences[i : i + 8]) + "." for i in range(0, len(sentences), 8)]
    cut = len(paragraphs) * 9 // 10
    return write_data(work, "speeches", paragraphs[:cut], paragraphs[cut:])


def write_summaries(work: Path) -> Data:
    """All Wikipedia summaries but every fortieth, and those."""
    texts = [part for part in load_corpus("wikipedia-summaries").text.split("\n") if part.strip()]
    held_out = texts[::HELD_OUT_EVERY]
    train = [text for number, text in enumerate(texts) if number % HELD_OUT_EVERY]
    return write_data(work, "summaries", train, held_out)


def write_data(work: Path, name: str, train: list[str], held_out: list[str]) -> Data:
    paths = work / f"{name}.jsonl", work / f"{name}-held-out.jsonl"
    for path, texts in zip(paths, (train, held_out), strict=True):
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return paths


def random_model(folder: Path, source: Path, shape: tuple[int, int, int, int]) -> None:
    """A model of random weights with SmolLM2's tokenizer, in the registry of a folder of its own."""
    hidden, width, heads, layers = shape
    config = transformers.AutoConfig.from_pretrained(source)
    changed = {
        "hidden_size": hidden, "intermediate_size": width, "num_attention_heads": heads,
        "num_key_value_heads": heads, "num_hidden_layers": layers, "head_dim": hidden // heads,
    }  # fmt: skip
    for name, value in changed.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    raw = folder / "raw"
    transformers.LlamaForCausalLM(config).save_pretrained(raw)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, raw / name)
    import_folder(ModelRegistry(folder / "models"), "random", raw)


def galore_torch(model: Any, settings: FinetuneSettings) -> Any:
    from galore_torch.adamw import AdamW

    model.requires_grad_(True)
    method: Any = settings.method
    named = [("_proj.weight" in name, p) for name, p in model.named_parameters()]
    projected = {
        "params": [p for in_block, p in named if in_block],
        "rank": method.rank,
        "update_proj_gap": method.refresh_interval,
        "scale": method.scale,
        "proj_type": "std",
    }
    others = {"params": [p for in_block, p in named if not in_block]}
    return AdamW([projected, others], weight_decay=0.0, no_deprecation_warning=True)


def peft_lora(model: Any, settings: FinetuneSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    method: Any = settings.method
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    config = LoraConfig(
        r=method.rank, lora_alpha=method.alpha, lora_dropout=method.dropout, target_modules=targets
    )
    get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=0.0)


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch]) -> float:
    training = model.training
    model.eval()
    nll = sum(float(total_loss(model, batch)) for batch in batches)
    model.train(training)
    return nll / sum(batch.num_learnt for batch in batches)


def page(rows: dict[str, list[Row]]) -> list[str]:
    lines = [
        "# SmolLM2-135M: finetuning methods side by side",
        "",
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}. Command: `python -m benchmarks.training`; settings of every row are"
        " in the JSON file beside this page. Losses are of held-out text, in nats per token; MB are 10^6 bytes held.",
    ]
    titles = {
        "dense": "Finetuning on the speeches",
        "low_rank": "After WeLore at an effective rank reduction of 50 %",
        "pretrain": "From random weights, on Wikipedia summaries",
    }
    for part, title in titles.items():
        if rows[part]:
            lines += ["", f"## {title}", "", *table(rows[part]), "", *curves(rows[part])]
    if rows["step_time"]:
        lines += ["", "## Processor seconds of a step, in turns", ""]
        for row in rows["step_time"]:
            lines.append(f"- {row['name']}: {row['seconds']:.2f} s, {row['num_tokens']} tokens")
        if len(rows["step_time"]) == 2:
            one, two = (row["seconds"] for row in rows["step_time"])
            lines.append(f"- ratio: {two / one:.3f}")
    return lines


def table(rows: list[Row]) -> list[str]:
    parts = ("weights", "optimizer", "projections", "gradients", "activations")
    head = ["method", "tokens", "loss before", "after", "perplexity", *(f"{p}, MB" for p in parts)]
    head += ["weights + optimizer", "predicted peak", "measured", "tokens/s", "bases found"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    baseline = state_bytes(rows[0])
    for row in rows:
        measured = row["measured"]
        fixed = row.get("refreshes_fixed")
        cells = [
            row["name"],
            f"{row['num_tokens']:,}",
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{math.exp(row['after']):.2f}",
            *(f"{measured[part] / 1e6:,.1f}" if part in measured else "" for part in parts),
            f"{state_bytes(row) / 1e6:,.1f} ({state_bytes(row) / baseline:.0%})",
            *peaks(row),
            f"{row['tokens_per_second']:.0f}",
            f"{row['refreshes']:,} of {fixed:,}" if fixed else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def state_bytes(row: Row) -> float:
    """Weights, moments and bases."""
    return float(sum(row["measured"][part] for part in ("weights", "optimizer", "projections")))


def peaks(row: Row) -> list[str]:
    """Predicted and measured, without what is only measured on a GPU."""
    if "predicted" not in row:
        return ["", ""]
    predicted = row["predicted"]["peak"] - row["predicted"]["temporary"]
    return [f"{predicted / 1e6:,.0f}", f"{row['measured']['peak'] / 1e6:,.0f}"]


def curves(rows: list[Row]) -> list[str]:
    """Training losses at a few steps."""
    lines = []
    for row in rows:
        losses = row["losses"]
        at = sorted({round(i * (len(losses) - 1) / 7) for i in range(8)})
        points = ", ".join(f"{losses[i][0]}: {losses[i][1]:.3f}" for i in at)
        lines.append(f"- {row['name']}, training loss by step: {points}")
    return lines


if __name__ == "__main__":
    set_torch_environment()
    main()
