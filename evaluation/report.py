"""The report of a compression: what was saved, what was lost, and how each was measured. As JSON and as Markdown."""

import dataclasses
from typing import Any

from compression.checkpoint import Manifest
from evaluation.perplexity import Perplexity
from evaluation.speed import Speed

JsonObject = dict[str, Any]


def build_report(
    *,
    before: Manifest,
    after: Manifest,
    resident_before: int,
    resident_after: int,
    perplexity_before: Perplexity,
    perplexity_after: Perplexity,
    speed_before: Speed,
    speed_after: Speed,
) -> JsonObject:
    """The report as JSON. `bytes` are of tensors on disk, `resident_bytes` of the weights as loaded here."""
    assert perplexity_before.protocol == perplexity_after.protocol
    return {
        "parameters": {"before": before.parameters, "after": after.parameters},
        "bytes": _pair(before.tensor_bytes, after.tensor_bytes),
        "resident_bytes": _pair(resident_before, resident_after),
        "perplexity": {
            **_pair(perplexity_before.value, perplexity_after.value),
            "protocol": dataclasses.asdict(perplexity_after.protocol),
        },
        "speed": {
            "before": dataclasses.asdict(speed_before),
            "after": dataclasses.asdict(speed_after),
            "decode_ratio": speed_after.decode_tokens_per_second
            / speed_before.decode_tokens_per_second,
            "prefill_ratio": speed_after.prefill_tokens_per_second
            / speed_before.prefill_tokens_per_second,
            "note": "transformers' modules at batch size 1, not the serving engine",
        },
        "matrices": [matrix.to_json() for matrix in after.matrices],
    }


def _pair(before: float, after: float) -> JsonObject:
    return {"before": before, "after": after, "ratio": after / before}


def to_markdown(title: str, report: JsonObject) -> str:
    """A page for people: one table of totals, the protocol, one row per layer that stayed dense."""
    perplexity, speed = report["perplexity"], report["speed"]
    protocol = perplexity["protocol"]
    rows = [
        ("parameters", *(f"{report['parameters'][k]:,}" for k in ("before", "after")), ""),
        ("bytes on disk", *_numbers(report["bytes"], ",.0f")),
        ("bytes resident", *_numbers(report["resident_bytes"], ",.0f")),
        ("perplexity", *_numbers(perplexity, ".3f")),
        (
            "decode tokens/s",
            *(f"{speed[k]['decode_tokens_per_second']:.1f}" for k in ("before", "after")),
            f"{speed['decode_ratio']:.3f}",
        ),
        (
            "prefill tokens/s",
            *(f"{speed[k]['prefill_tokens_per_second']:.0f}" for k in ("before", "after")),
            f"{speed['prefill_ratio']:.3f}",
        ),
    ]
    lines = [f"# {title}", "", "| | before | after | ratio |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        f"Perplexity: {protocol['corpus']}, {protocol['num_windows']} windows of {protocol['window']} tokens,"
        f" stride {protocol['stride']}, {protocol['num_tokens']} tokens scored, {protocol['dtype']}"
        f" on {protocol['device']}.",
        f"Speed: {speed['note']}; medians of {speed['after']['rounds']} interleaved rounds,"
        f" {speed['after']['num_threads']} threads.",
    ]
    dense = [m for m in report["matrices"] if m["dense_reason"]]
    if dense:
        lines += ["", "| left dense | why |", "|---|---|"]
        lines += [f"| {matrix['name']} | {matrix['dense_reason']} |" for matrix in dense]
    return "\n".join(lines) + "\n"


def _numbers(pair: JsonObject, spec: str) -> tuple[str, str, str]:
    return format(pair["before"], spec), format(pair["after"], spec), f"{pair['ratio']:.3f}"
