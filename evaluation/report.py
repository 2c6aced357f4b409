"""The report of a compression: what was saved, what was lost, and how each was measured. As JSON, Markdown and HTML."""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

from compression.checkpoint import Manifest
from evaluation.perplexity import Comparison
from evaluation.speed import Speed

JsonObject = dict[str, Any]


def build_report(
    *,
    before: Manifest,
    after: Manifest,
    resident_before: int,
    resident_after: int,
    comparisons: Sequence[Comparison],
    speed_before: Speed,
    speed_after: Speed,
) -> JsonObject:
    """The report as JSON. `bytes` are of tensors on disk, `resident_bytes` of the weights as loaded here.

    Args:
        comparisons: one per corpus; `perplexity`, the figure of the gate and of the summary, is the first one's.
    """
    corpora = [corpus_report(comparison) for comparison in comparisons]
    return {
        "parameters": _pair(before.parameters, after.parameters),
        "bytes": _pair(before.tensor_bytes, after.tensor_bytes),
        "resident_bytes": _pair(resident_before, resident_after),
        "perplexity": corpora[0],
        "corpora": corpora,
        "effective_rank_reduction": after.ratios.get("effective_rank_reduction"),
        "speed": {
            "before": dataclasses.asdict(speed_before),
            "after": dataclasses.asdict(speed_after),
            "decode_ratio": speed_after.decode_tokens_per_second
            / speed_before.decode_tokens_per_second,
            "prefill_ratio": speed_after.prefill_tokens_per_second
            / speed_before.prefill_tokens_per_second,
            "note": "transformers' modules at batch size 1, not the serving engine",
        },
        "recipe": after.recipe,
        "calibration": after.calibration,
        "notes": _notes(after),
        "stage_results": after.stage_results,
        "matrices": [matrix.to_json() for matrix in after.matrices],
    }


def corpus_report(comparison: Comparison) -> JsonObject:
    assert comparison.before.protocol == comparison.after.protocol
    return {
        **_pair(comparison.before.value, comparison.after.value),
        "kl_divergence": comparison.kl_divergence,
        "top1_agreement": comparison.top1_agreement,
        "protocol": dataclasses.asdict(comparison.after.protocol),
    }


def _pair(before: float, after: float) -> JsonObject:
    return {"before": before, "after": after, "ratio": after / before}


def _notes(after: Manifest) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    sparse = [m for m in after.matrices if m.sparsity and m.linear.kind != "two_four"]
    if sparse:
        weights = [m.linear.out_features * m.linear.in_features for m in sparse]
        zeros = sum(m.sparsity * count for m, count in zip(sparse, weights, strict=True))
        notes.append(
            f"{zeros / sum(weights):.1%} of the weights of {len(sparse)} matrices are zero. They are stored and"
            " multiplied like any other: this sparsity saves neither memory nor time."
        )
    packed = [m for m in after.matrices if m.linear.kind == "two_four"]
    if packed:
        notes.append(
            f"{len(packed)} matrices are 2:4 sparse and stored packed. They save time on NVIDIA GPUs with sparse matrix"
            " units only; elsewhere they are unpacked at load and multiplied like any other."
        )
    larger = [
        m
        for m in after.matrices
        if m.linear.kind == "dense" and "cut to rank" in (m.dense_reason or "")
    ]
    if larger:
        notes.append(
            f"{len(larger)} matrices were cut to a lower rank and stored whole, because two factors would hold no fewer"
            " numbers: they lost accuracy and save nothing."
        )
    return notes


def worst_perplexity_ratio(report: JsonObject) -> float:
    """The largest ratio over all corpora; NaN where one is, so that no comparison holds."""
    ratios = [float(corpus["ratio"]) for corpus in report["corpora"]]
    return max(ratios, key=lambda ratio: (ratio != ratio, ratio))


def worst_top1_agreement(report: JsonObject) -> float:
    return min(float(corpus["top1_agreement"]) for corpus in report["corpora"])


def _tables(report: JsonObject) -> list[tuple[str, list[list[str]]]]:
    """(title, rows with a head) of every table of the report."""
    speed = report["speed"]
    totals = [["", "before", "after", "after / before"]]
    totals.append(["parameters", *_numbers(report["parameters"], ",.0f")])
    totals.append(["bytes on disk", *_numbers(report["bytes"], ",.0f")])
    totals.append(["bytes resident", *_numbers(report["resident_bytes"], ",.0f")])
    for name in ("decode", "prefill"):
        key = f"{name}_tokens_per_second"
        values = [f"{speed[side][key]:.1f}" for side in ("before", "after")]
        totals.append([f"{name} tokens/s", *values, f"{speed[f'{name}_ratio']:.3f}"])
    quality = [["corpus", "before", "after", "after / before", "KL (nats)", "same top token"]]
    for corpus in report["corpora"]:
        quality.append(
            [
                corpus["protocol"]["corpus"],
                *_numbers(corpus, ".3f"),
                f"{corpus['kl_divergence']:.4f}",
                f"{corpus['top1_agreement']:.1%}",
            ]
        )
    matrices = [["matrix", "stored as", "rank", "sparsity", "parameters", "bytes", "why dense"]]
    for row in report["matrices"]:
        matrices.append(
            [
                row["name"],
                _stored_as(row),
                str(row.get("rank", "")),
                f"{row['sparsity']:.1%}" if row["sparsity"] else "",
                f"{row['parameters']:,}",
                f"{row['bytes']:,}",
                row["dense_reason"] or "",
            ]
        )
    return [("Totals", totals), ("Perplexity", quality), ("Matrices", matrices)]


def _stored_as(row: JsonObject) -> str:
    if row["kind"] == "low_rank":
        return f"low rank ({row['weight_u']['kind']}, {row['weight_v']['kind']})"
    return str(row["kind"])


def protocol_line(protocol: JsonObject) -> str:
    hashes = [protocol[f"{what}_sha256"][:12] for what in ("corpus", "tokenizer")]
    return (
        f"{protocol['corpus']}: {protocol['num_windows']} windows of {protocol['window']} tokens, stride"
        f" {protocol['stride']}, {protocol['num_tokens']} tokens scored, {protocol['dtype']} on"
        f" {protocol['device']}, corpus sha256 {hashes[0]}, tokenizer sha256 {hashes[1]}."
    )


def _protocol(report: JsonObject) -> list[str]:
    speed = report["speed"]
    lines = [protocol_line(corpus["protocol"]) for corpus in report["corpora"]]
    lines.append(
        f"Speed: {speed['note']}; medians of {speed['after']['rounds']} interleaved rounds,"
        f" {speed['after']['num_threads']} threads."
    )
    if report["effective_rank_reduction"] is not None:
        lines.append(f"Effective rank reduction: {report['effective_rank_reduction']:.4f}.")
    if report["calibration"] is not None:
        settings = ", ".join(f"{key} {value}" for key, value in report["calibration"].items())
        lines.append(f"Calibration: {settings}.")
    return [*lines, *report["notes"]]


def to_markdown(title: str, report: JsonObject) -> str:
    """A page for people."""
    lines = [f"# {title}", "", f"Recipe: `{report['recipe']}`"]
    for name, (head, *rows) in _tables(report):
        lines += ["", f"## {name}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "## How it was measured", ""]
    lines += [f"- {line}" for line in _protocol(report)]
    return "\n".join(lines) + "\n"


PAGE_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child,td:last-child{text-align:left}img{max-width:100%}"
)


def to_html(title: str, report: JsonObject, pictures: Mapping[str, bytes]) -> str:
    """The same as one file that needs no other.

    Args:
        pictures: caption to PNG.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{PAGE_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>Recipe: <code>{html.escape(str(report['recipe']))}</code>",
    ]
    tables = {name: html_table(rows) for name, rows in _tables(report)}
    for name in ("Totals", "Perplexity"):
        parts.append(f"<h2>{name}</h2>{tables[name]}")
    notes = "".join(f"<li>{html.escape(line)}" for line in _protocol(report))
    parts.append(f"<h2>How it was measured</h2><ul>{notes}</ul>")
    for caption, png in pictures.items():
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        parts.append(f"<h2>{text}</h2><img alt='{text}' src='data:image/png;base64,{data}'>")
    parts.append(f"<h2>Matrices</h2>{tables['Matrices']}</html>")
    return "\n".join(parts) + "\n"


def html_table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr><th>" + "<th>".join(head), *("<tr><td>" + "<td>".join(row) for row in body)]
    return f"<table>{''.join(lines)}</table>"


def _numbers(pair: JsonObject, spec: str) -> tuple[str, str, str]:
    return format(pair["before"], spec), format(pair["after"], spec), f"{pair['ratio']:.3f}"
