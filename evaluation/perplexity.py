"""Perplexity, with the protocol that makes a figure comparable.

A corpus is tokenized in pieces that begin at a blank line: whole, its encoding takes a hundred times the text's memory.

Windows of `window` tokens start every `stride` tokens; each window scores its last `stride` tokens (the first
window all but
its first token), given what precedes them in the window. Perplexity is exp of the mean negative log-likelihood over all
scored tokens. With stride == window this is the usual non-overlapping protocol.
"""

import dataclasses
import hashlib
import math
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from compression.memory import trim_heap
from evaluation.corpora import Corpus

PIECE_CHARACTERS = 200_000
ROWS_AT_ONCE = 16  # of logits in float32: 3 MB for each at a vocabulary of 49,152


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


def tokenize(folder: Path, corpus: Corpus, *, at_least: int | None = None) -> tuple[list[int], str]:
    """Token ids of a corpus under a checkpoint's tokenizer, and the sha256 of tokenizer.json.

    Args:
        at_least: tokens that are needed; of a longer text, the pieces behind them are left out.
    """
    raw = (folder / "tokenizer.json").read_bytes()
    return list(_encode(raw, corpus.text, at_least)), hashlib.sha256(raw).hexdigest()


@lru_cache(maxsize=2)
def _encode(tokenizer_json: bytes, text: str, at_least: int | None) -> "array[int]":
    """A job asks for the same corpora again and again; a large one takes seconds."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_truncation()
    ids = array("I")
    start = 0
    while start < len(text) and (at_least is None or len(ids) < at_least):
        end = text.find("\n\n", start + PIECE_CHARACTERS)
        end = len(text) if end < 0 else end
        ids.extend(tokenizer.encode(text[start:end], add_special_tokens=False).ids)
        start = end
    del tokenizer
    trim_heap()
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """What is scored: token ids of each window, of which the last `num_scored[i]` count."""

    ids: list[list[int]]
    num_scored: list[int]
    protocol: Protocol


def windows_of(
    model: Any, folder: Path, corpus: Corpus, *, window: int, stride: int, max_windows: int
) -> Windows:
    """Cut a corpus by the protocol of this module; `model` says in which dtype and where it is scored.

    Raises:
        ValueError: a setting is out of range, or the corpus is shorter than a window.
    """
    if not 1 <= stride <= window or window < 2:
        raise ValueError(f"need 1 <= stride <= window, window >= 2; got {stride}, {window}")
    needed = (max_windows - 1) * stride + window
    token_ids, tokenizer_sha256 = tokenize(folder, corpus, at_least=needed)
    starts = list(range(0, len(token_ids) - window + 1, stride))[:max_windows]
    if not starts:
        raise ValueError(
            f"corpus {corpus.name} has {len(token_ids)} tokens, a window needs {window}"
        )
    num_scored = [window - 1, *[min(stride, window - 1)] * (len(starts) - 1)]
    protocol = Protocol(
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        tokenizer_sha256=tokenizer_sha256,
        window=window,
        stride=stride,
        num_windows=len(starts),
        num_tokens=sum(num_scored),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
    )
    ids = [token_ids[start : start + window] for start in starts]
    return Windows(ids=ids, num_scored=num_scored, protocol=protocol)


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
        ValueError: as of `windows_of`.
    """
    windows = windows_of(
        model, folder, corpus, window=window, stride=stride, max_windows=max_windows
    )
    total_nll = 0.0
    for index, ids in enumerate(windows.ids):
        on_window(index, len(windows.ids))
        nll_T = token_nll(model, torch.tensor(ids, device=model.device))
        total_nll += float(nll_T[-windows.num_scored[index] :].double().sum())
    return Perplexity(
        value=_exp(total_nll / windows.protocol.num_tokens), protocol=windows.protocol
    )


def token_nll(model: Any, ids_S: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first, float32 (S - 1,)."""
    logits_SV = model(ids_S[None], use_cache=False).logits[0, :-1]
    pairs = zip(
        torch.split(logits_SV, ROWS_AT_ONCE), torch.split(ids_S[1:], ROWS_AT_ONCE), strict=True
    )
    losses = [F.cross_entropy(x_RV.float(), ids_R, reduction="none") for x_RV, ids_R in pairs]
    return torch.cat(losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models on the same windows.

    Attributes:
        kl_divergence: mean over scored tokens of KL(before || after) of the next-token distributions, in nats.
        top1_agreement: share of scored tokens at which both find the same token likeliest.
    """

    before: Perplexity
    after: Perplexity
    kl_divergence: float
    top1_agreement: float


@torch.inference_mode()
def compare_models(
    before: Any,
    after: Any,
    folder: Path,
    corpus: Corpus,
    *,
    window: int = 512,
    max_windows: int = 16,
    on_window: Any = lambda done, total: None,
) -> Comparison:
    """Perplexity of both models and how far apart they are, in one pass over non-overlapping windows.

    Raises:
        ValueError: as of `windows_of`.
    """
    windows = windows_of(
        after, folder, corpus, window=window, stride=window, max_windows=max_windows
    )
    sums = [0.0] * 4
    for index, ids in enumerate(windows.ids):
        on_window(index, len(windows.ids))
        ids_S = torch.tensor(ids, device=after.device)
        for which, value in enumerate(_compare(before, after, ids_S)):
            sums[which] += value
    num_tokens = len(windows.ids) * (window - 1)
    protocol = dataclasses.replace(windows.protocol, num_tokens=num_tokens)
    return Comparison(
        before=Perplexity(value=_exp(sums[0] / num_tokens), protocol=protocol),
        after=Perplexity(value=_exp(sums[1] / num_tokens), protocol=protocol),
        kl_divergence=sums[2] / num_tokens,
        top1_agreement=sums[3] / num_tokens,
    )


def _compare(before: Any, after: Any, ids_S: Tensor) -> list[float]:
    """Of one window: both losses, the divergence and the number of agreements, summed over tokens."""
    logits = []
    for model in (before, after):
        logits.append(model(ids_S[None], use_cache=False).logits[0, :-1])
        trim_heap()  # of what the layers left, before distributions are laid beside it
    sums = [0.0] * 4
    rows = (torch.split(x, ROWS_AT_ONCE) for x in (ids_S[1:], *logits))
    for targets_R, *logits_RV in zip(*rows, strict=True):
        logs_RV = [x_RV.float().log_softmax(dim=-1) for x_RV in logits_RV]
        for which, log_RV in enumerate(logs_RV):
            sums[which] += float(F.nll_loss(log_RV, targets_R, reduction="sum"))
        sums[2] += float(F.kl_div(logs_RV[1], logs_RV[0], reduction="sum", log_target=True))
        sums[3] += int((logs_RV[0].argmax(dim=-1) == logs_RV[1].argmax(dim=-1)).sum())
    return sums


def _exp(nll: float) -> float:
    """Infinity where a broken model's loss is too large for a float, NaN where it is one."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
