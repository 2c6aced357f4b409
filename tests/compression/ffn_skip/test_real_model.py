"""The paper's ablation on SmolLM2: at an equal share of rows, the adaptive rule loses less than random and static."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from compression.ffn_skip.baselines import ShareSkip, random_shares, static_shares
from compression.ffn_skip.calibrate import SkipCalibration
from compression.ffn_skip.teacher_forced import AdaptiveSkip, Policy, feed_forwards_replaced
from compression.hf import load_model
from evaluation.corpora import load_corpus
from evaluation.perplexity import tokenize

WARM_UP = 25


@pytest.mark.real_model
def test_adaptive_loses_less_than_random_and_static(real_home: Path) -> None:
    folder = real_home / "models" / "smollm2-135m"
    model = load_model(folder)
    token_ids, _ = tokenize(folder, load_corpus("state-of-the-union"))
    ids_NS = torch.tensor(token_ids[: 2 * 256]).view(2, 256)
    calibration = SkipCalibration(model, ids_NS, k=1, warm_up=WARM_UP)
    rule = calibration.rule((2, 2))

    def loss(policy: Policy) -> float:
        with torch.inference_mode(), feed_forwards_replaced(model, policy):
            logits_BTV: Any = model(ids_NS, use_cache=False).logits[:, WARM_UP:-1].float()
        return float(F.cross_entropy(logits_BTV.flatten(0, 1), ids_NS[:, WARM_UP + 1 :].flatten()))

    dense = loss(AdaptiveSkip(rule, 1.01))
    adaptive = AdaptiveSkip(rule, 0.973)  # about a fifth of all rows
    losses = {"adaptive": loss(adaptive)}
    ratio = adaptive.skip_ratio
    assert 0.15 < ratio < 0.27
    means = calibration.observe().means
    losses["random"] = loss(ShareSkip(rule, random_shares(rule, ratio)))
    losses["static"] = loss(ShareSkip(rule, static_shares(rule, means, ratio)))
    assert dense < losses["adaptive"] < losses["random"] < losses["static"], losses
    assert losses["adaptive"] - dense < 1.0
