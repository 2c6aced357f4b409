"""How a job and its report look in a terminal; shared by `lathe` and the demo."""

import time
from collections.abc import Sequence
from typing import Any

from service.api_client import ApiClient
from service.terminal import Terminal, bar, clock, sparkline

JsonObject = dict[str, Any]


def follow(client: ApiClient, job_id: str, terminal: Terminal) -> JsonObject:
    """Show a job's events and progress until it ends; returns the job as it ended."""
    started = time.monotonic()
    training = _Training()
    for event in client.follow_job(job_id):
        step, total = progress_of(event)
        if event["type"] == "metrics" and "loss" in event["data"]:
            terminal.live(training.line(event["data"], sparklines=terminal.can_draw_lines))
        elif event["type"] != "progress":
            terminal.line(event_line(event))
        elif total and step > training.total:
            terminal.progress(f"step {step}/{total}", step / total, started)
    return dict(client.get(f"/v1/jobs/{job_id}"))


class _Training:
    """The live line of a training run.

    Attributes:
        total: steps of the run; what is beyond them is measured after it.
    """

    def __init__(self) -> None:
        self.total = 0
        self._losses: dict[int, float] = {}

    def line(self, data: JsonObject, *, sparklines: bool) -> str:
        step, self.total = int(data["step"]), int(data["total"])
        # A resumed run repeats steps; what came behind them is no more.
        self._losses = {s: loss for s, loss in self._losses.items() if s < step}
        parts = [f"step {step}/{self.total} {bar(step / self.total)}"]
        if data["loss"] is not None:
            self._losses[step] = float(data["loss"])
            course = f" {sparkline(list(self._losses.values()))}" if sparklines else ""
            parts.append(f"loss {data['loss']:.4f}{course}")
        parts.append(f"lr {data['learning_rate']:.2e}")
        parts.append(f"{data['tokens_per_second']:,.0f} tokens/s")
        if data["eta_seconds"] is not None:
            parts.append(f"ETA {clock(data['eta_seconds'])}")
        return "  ".join(parts)


def progress_of(event: JsonObject) -> tuple[int, int]:
    """(step, total) of a progress event; (0, 0) of any other."""
    data = event.get("data") or {}
    return int(data.get("step") or 0), int(data.get("total") or 0)


def event_line(event: JsonObject) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
    level = "" if event["level"] == "info" else f"{event['level']}: "
    return f"{clock}  {level}{event['message']}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return [
        lines[0].rstrip(),
        *("  ".join("-" * width for width in widths),),
        *map(str.rstrip, lines[1:]),
    ]


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def report_lines(report: JsonObject) -> list[str]:
    """A job's report, by its kind: what changed, by how much, and how it was measured."""
    if "targets" in report:
        return _skip_lines(report)
    if "evaluations" in report:
        return _training_lines(report)
    speed = report["speed"]
    rows = [
        ["", "before", "after", "after / before"],
        _row("parameters", report["parameters"], "{:,.0f}"),
        _row("bytes on disk", report["bytes"], "{:,.0f}"),
        _row("bytes in memory", report["resident_bytes"], "{:,.0f}"),
        *(
            _row(f"perplexity, {corpus['protocol']['corpus']}", corpus, "{:.3f}")
            for corpus in report["corpora"]
        ),
    ]
    for name in ("decode", "prefill"):
        key = f"{name}_tokens_per_second"
        pair = {"before": speed["before"][key], "after": speed["after"][key]}
        rows.append(_row(f"{name} tokens/s", pair, "{:,.1f}"))
    protocol = report["perplexity"]["protocol"]
    return [
        *table(rows),
        *(
            f"Against the original on {corpus['protocol']['corpus']}: KL {corpus['kl_divergence']:.4f} nats, "
            f"the same top token at {corpus['top1_agreement']:.1%}."
            for corpus in report["corpora"]
        ),
        *report["notes"],
        f"Perplexity on {protocol['corpus']}: {protocol['num_windows']} windows of {protocol['window']} tokens, "
        f"stride {protocol['stride']}, {protocol['num_tokens']} tokens scored, {protocol['dtype']} on "
        f"{protocol['device']}.",
        f"Speed: {speed['note']}.",
    ]


def _skip_lines(report: JsonObject) -> list[str]:
    rows = [["target", "policy", "skipped", "weight bytes", "perplexity", "ratio"]]
    for target in report["targets"]:
        for name, row in target["policies"].items():
            skipped = f"{row['skip_ratio']:.1%}" if "skip_ratio" in row else None
            rows.append(
                [
                    f"{target['target_ratio']:.0%}",
                    name,
                    skipped or f"{row['num_blocks']:.1f} blocks",
                    f"{1 - target['saved']:.1%}",
                    f"{row['perplexity']:.3f}",
                    f"{row['ratio']:.3f}",
                ]
            )
    offered = ", ".join(f"{ratio:.0%}" for ratio in report["offered"]) or "nothing"
    limit = report["max_perplexity_ratio"]
    return [*table(rows), f"Offered: {offered}, of a perplexity ratio of at most {limit}."]


def _training_lines(report: JsonObject) -> list[str]:
    evaluations = [["step", "evaluation loss"]]
    evaluations += [[str(step), f"{loss:.4f}"] for step, loss in report["evaluations"]]
    memory = [["memory", "predicted", "measured"]]
    for part, predicted in report["predicted"].items():
        measured = report["measured"][part]
        shown = "" if measured is None else human_bytes(measured)
        memory.append([part, human_bytes(predicted), shown])
    lines = [
        f"{report['steps']} steps over {report['num_tokens']:,} tokens of {report['num_examples']} examples, "
        f"{report['tokens_per_second']:,.0f} tokens/s, {clock(report['seconds'])}",
        *(table(evaluations) if report["evaluations"] else []),
        *table(memory),
    ]
    for corpus in report["corpora"]:
        lines.append(
            f"Perplexity on {corpus['protocol']['corpus']}: {corpus['before']:.3f} before, {corpus['after']:.3f} after."
        )
    return lines


def _row(name: str, pair: JsonObject, form: str) -> list[str]:
    before, after = float(pair["before"]), float(pair["after"])
    return [name, form.format(before), form.format(after), f"{after / before:.3f}"]
