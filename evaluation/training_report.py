"""The report of a finetuning run: what it learnt, what that cost elsewhere, and what it took. As Markdown and HTML."""

import base64
import html
from collections.abc import Mapping
from typing import Any

from evaluation.report import PAGE_STYLE, html_table, protocol_line

JsonObject = dict[str, Any]


def _tables(report: JsonObject) -> list[tuple[str, list[list[str]]]]:
    """(title, rows with a head) of every table of the report."""
    run = [
        ["", ""],
        ["optimizer steps", f"{report['steps']:,}"],
        ["training examples", f"{report['num_examples']:,}"],
        ["evaluation examples", f"{report['num_evaluation_examples']:,}"],
        ["tokens", f"{report['num_tokens']:,}"],
        ["tokens/s", f"{report['tokens_per_second']:,.1f}"],
        ["seconds", f"{report['seconds']:,.1f}"],
        ["updates skipped (gradients not finite)", f"{report['skipped_updates']:,}"],
    ]
    if report["refreshes_fixed"]:
        saved = 1 - report["refreshes"] / report["refreshes_fixed"]
        run.append(["refreshes of subspaces", f"{report['refreshes']:,} ({saved:.1%} saved)"])
    evaluations = [["step", "evaluation loss"]]
    evaluations += [[f"{step:,}", f"{loss:.4f}"] for step, loss in report["evaluations"]]
    corpora = [["corpus", "before", "after", "after / before", "same top token"]]
    for corpus in report["corpora"]:
        corpora.append(
            [
                corpus["protocol"]["corpus"],
                *(f"{corpus[side]:.3f}" for side in ("before", "after", "ratio")),
                f"{corpus['top1_agreement']:.1%}",
            ]
        )
    memory = [["bytes", "predicted", "measured"]]
    for part, predicted in report["predicted"].items():
        memory.append([part, f"{predicted:,}", f"{report['measured'][part]:,}"])
    return [
        ("Run", run),
        ("Evaluation", evaluations),
        ("Perplexity on other text", corpora),
        ("Memory", memory),
    ]


def _notes(report: JsonObject) -> list[str]:
    lines = [
        f"{name.replace('_', ' ')}: {file['filename']}, {file['bytes']:,} bytes, sha256 {file['sha256'][:12]}."
        for name, file in report["data"].items()
    ]
    lines += [protocol_line(corpus["protocol"]) for corpus in report["corpora"]]
    return lines


def _lead(report: JsonObject) -> str:
    """The settings that differ from run to run, on one line."""
    return ", ".join(f"{key} {value}" for key, value in report["settings"].items())


def to_markdown(title: str, report: JsonObject) -> str:
    """A page for people."""
    lines = [f"# {title}", "", f"Settings: `{_lead(report)}`"]
    for name, (head, *rows) in _tables(report):
        lines += ["", f"## {name}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "## How it was measured", "", *(f"- {line}" for line in _notes(report))]
    return "\n".join(lines) + "\n"


def to_html(title: str, report: JsonObject, pictures: Mapping[str, bytes]) -> str:
    """The same as one file that needs no other.

    Args:
        pictures: caption to PNG.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{PAGE_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>Settings: <code>{html.escape(_lead(report))}</code>",
    ]
    for caption, png in pictures.items():
        data = base64.b64encode(png).decode()
        text = html.escape(caption)
        parts.append(f"<h2>{text}</h2><img alt='{text}' src='data:image/png;base64,{data}'>")
    parts += [f"<h2>{name}</h2>{html_table(rows)}" for name, rows in _tables(report)]
    notes = "".join(f"<li>{html.escape(line)}" for line in _notes(report))
    parts.append(f"<h2>How it was measured</h2><ul>{notes}</ul></html>")
    return "\n".join(parts) + "\n"
