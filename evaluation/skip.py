"""What skipping feed-forwards costs, beside every baseline at equal weight traffic. As JSON and as Markdown.

Perplexity is teacher-forced (`compression/ffn_skip/teacher_forced.py`): the first `warm_up` tokens of a window run in
full and are not scored, but for the first window's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from compression.ffn_skip.baselines import (
    ShareSkip,
    random_shares,
    ranked_shares,
    static_shares,
    unified_layers,
)
from compression.ffn_skip.calibrate import Observation
from compression.ffn_skip.rule import SkipRule
from compression.ffn_skip.substitute import Fitted
from compression.ffn_skip.teacher_forced import (
    AdaptiveSkip,
    blocks_skipped,
    feed_forwards_replaced,
)
from evaluation.corpora import Corpus
from evaluation.perplexity import measure_perplexity

JsonObject = dict[str, Any]
SCORED_TOKENS = 256
POLICIES = {
    "adaptive, substitutes": "FFN-SkipLLM with fitted substitutes: what the profile does",
    "adaptive": "FFN-SkipLLM as published",
    "random": "random middle feed-forwards",
    "static": "the feed-forwards of highest mean similarity, for every token",
    "shortgpt": "the blocks of least influence (ShortGPT)",
    "unified": "evenly spaced blocks (Unified Layer Skipping)",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SkipTrial:
    """One model and the text that its skipping is measured on.

    Attributes:
        folder: the checkpoint, for its tokenizer.
        on_window: as of `measure_perplexity`.
    """

    model: Any
    folder: Path
    corpus: Corpus
    rule: SkipRule
    max_windows: int
    on_window: Callable[[int, int], None] = lambda done, total: None

    def dense(self) -> JsonObject:
        return self._perplexity(nullcontext())

    def adaptive(self, tau: float, substitutes: Mapping[int, Fitted]) -> JsonObject:
        policy = AdaptiveSkip(self.rule, tau, substitutes)
        found = self._perplexity(feed_forwards_replaced(self.model, policy))
        return found | {"tau": tau, "skip_ratio": policy.skip_ratio}

    def baseline(
        self, name: str, observation: Observation, ffn_ratio: float, num_blocks: float
    ) -> JsonObject:
        """Args:
        ffn_ratio: share of all (row, layer) pairs whose feed-forward is skipped.
        num_blocks: blocks that a row passes by, for baselines that skip whole ones.
        """
        rule, num_layers = self.rule, self.rule.num_layers
        if name in ("random", "static"):
            shares = (
                random_shares(rule, ffn_ratio)
                if name == "random"
                else static_shares(rule, observation.means, ffn_ratio)
            )
            policy = ShareSkip(rule, shares)
            found = self._perplexity(feed_forwards_replaced(self.model, policy))
            return found | {"skip_ratio": policy.skip_ratio}
        if name == "shortgpt":
            influence = observation.block_influence
            ranking = sorted(range(num_layers), key=lambda layer: influence[layer])
        else:
            ranking = unified_layers(num_layers, int(num_blocks) + 1)
        shares = ranked_shares(ranking, num_blocks)
        found = self._perplexity(blocks_skipped(self.model, shares, rule.warm_up))
        return found | {"num_blocks": num_blocks, "blocks": sorted(shares)}

    def _perplexity(self, replaced: AbstractContextManager[None]) -> JsonObject:
        with replaced:
            found = measure_perplexity(
                self.model,
                self.folder,
                self.corpus,
                window=self.rule.warm_up + 1 + SCORED_TOKENS,
                stride=SCORED_TOKENS,
                max_windows=self.max_windows,
                on_window=self.on_window,
            )
        return {"perplexity": found.value, "protocol": dataclasses.asdict(found.protocol)}


def to_markdown(title: str, report: JsonObject) -> str:
    """A page for people: the table, what is in it, the protocol, the layers."""
    dense, rule = report["dense"], report["rule"]
    protocol, calibration = dense["protocol"], report["calibration"]
    lines = [
        f"# {title}",
        "",
        f"Dense perplexity {dense['perplexity']:.3f}. Cold: first {rule['cold_start']} and last"
        f" {rule['cold_end']} of {rule['num_layers']} layers; k {rule['k']}, warm-up {rule['warm_up']} tokens.",
        "",
        "| target | policy | rows skipped | weight bytes read | perplexity | ratio to dense |",
        "|---|---|---|---|---|---|",
    ]
    for target in report["targets"]:
        for name, row in target["policies"].items():
            skipped = f"{row['skip_ratio']:.1%}" if "skip_ratio" in row else "whole blocks"
            lines.append(
                f"| {target['target_ratio']:.0%} | {name} | {skipped} | {1 - target['saved']:.1%} |"
                f" {row['perplexity']:.2f} | {row['ratio']:.3f} |"
            )
    lines += [
        "",
        "Policies of one target read the same share of the weights per decoded token, as counted on the calibration"
        " text; adaptive ones skip what they skip on the held-out text, which the third column says:",
    ]
    lines += [f"- {name}: {text}." for name, text in POLICIES.items()]
    lines += [
        "",
        f"Offered: {', '.join(f'{ratio:.0%}' for ratio in report['offered']) or 'nothing'}, of a perplexity"
        f" ratio of at most {report['max_perplexity_ratio']}.",
        f"Perplexity: {protocol['corpus']}, {protocol['num_windows']} windows of {protocol['window']} tokens,"
        f" stride {protocol['stride']}, {protocol['num_tokens']} tokens scored, {protocol['dtype']} on"
        f" {protocol['device']}; teacher-forced, tokens behind the warm-up count as decode steps.",
        f"Calibration: {calibration.get('file') or calibration['corpus']}, {calibration['samples']} samples of"
        f" {calibration['length']} tokens, {calibration['part']}, seed {calibration['seed']}.",
        "",
        "| layer | similarity p10 | mean | p90 | perplexity ratio without it | substitute | power missed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["layers"]:
        similarity, substitute = row["similarity"], row["substitute"]
        kind = f"{substitute['kind']} {substitute['rank'] or ''}".strip() if substitute else "cold"
        missed = "" if row["missed"] is None else f"{row['missed']:.2f}"
        lines.append(
            f"| {row['layer']} | {similarity['p10']:.3f} | {similarity['mean']:.3f} | {similarity['p90']:.3f} |"
            f" {row['damage']:.3g} | {kind} | {missed} |"
        )
    return "\n".join(lines) + "\n"
