"""Perplexity, with the protocol that makes a figure comparable.

Windows of `window` tokens start every `stride` tokens; each window scores its last `stride` tokens (the first window all but
its first token), given what precedes them in the window. Perplexity is exp of the mean negative log-likelihood over all
scored tokens. With stride == window this is the usual non-overlapping protocol.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from evaluation.corpora import Corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What a perplexity was measured with; two figures compare exactly when their protocols are equal.

    Attributes:
        num_windows: windows used, from the beginning of the corpus.
        num_tokens: tokens scored.
        dtype: of weights and activations; the loss is float32.
    """

    corpus: str
    corpus_sha256: str
    tokenizer_sha256: str
    window: int
    stride: int
    num_windows: int
    num_tokens: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Attributes: value: exp of the mean negative log-likelihood (natural log) per token."""

    value: float
    protocol: Protocol


def tokenize(folder: Path, corpus: Corpus) -> tuple[list[int], str]:
    """Token ids of a corpus under a checkpoint's tokenizer, and the sha256 of tokenizer.json."""
    from tokenizers import Tokenizer

    raw = (folder / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_str(raw.decode())
    tokenizer.no_truncation()
    ids = tokenizer.encode(corpus.text, add_special_tokens=False).ids
    return ids, hashlib.sha256(raw).hexdigest()


@torch.inference_mode()
def measure_perplexity(
    model: Any,
    folder: Path,
    corpus: Corpus,
    *,
    window: int = 512,
    stride: int = 512,
    max_windows: int = 32,
    on_window: Any = lambda done, total: None,
) -> Perplexity:
    """Measure a causal language model in eval mode.

    Args:
        folder: the checkpoint, for its tokenizer.
        on_window: called with (windows done, windows in all) before each; may raise to stop.

    Raises:
        ValueError: a setting is out of range, or the corpus is shorter than a window.
    """
    if not 1 <= stride <= window or window < 2:
        raise ValueError(f"need 1 <= stride <= window, window >= 2; got {stride}, {window}")
    token_ids, tokenizer_sha256 = tokenize(folder, corpus)
    starts = list(range(0, len(token_ids) - window + 1, stride))[:max_windows]
    if not starts:
        raise ValueError(
            f"corpus {corpus.name} has {len(token_ids)} tokens, a window needs {window}"
        )
    total_nll = 0.0
    num_tokens = 0
    for index, start in enumerate(starts):
        on_window(index, len(starts))
        ids_S = torch.tensor(token_ids[start : start + window], device=model.device)
        nll_T = token_nll(model, ids_S)
        scored = nll_T if index == 0 else nll_T[-stride:]
        total_nll += float(scored.double().sum())
        num_tokens += scored.numel()
    protocol = Protocol(
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        tokenizer_sha256=tokenizer_sha256,
        window=window,
        stride=stride,
        num_windows=len(starts),
        num_tokens=num_tokens,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
    )
    return Perplexity(value=math.exp(total_nll / num_tokens), protocol=protocol)


def token_nll(model: Any, ids_S: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first, float32 (S - 1,)."""
    logits_SV = model(ids_S[None], use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits_SV, ids_S[1:], reduction="none")
