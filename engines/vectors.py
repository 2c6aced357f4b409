"""What engines that embed have in common: checks of texts, batches of like length, vectors as bytes.

Shapes: B texts, H hidden.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engines.protocol import EmbedResult, EngineError, EngineInfo

MAX_BATCH_TEXTS = 32
MAX_BATCH_TOKENS = 2048


def check_texts(info: EngineInfo, texts: Sequence[Sequence[int]]) -> None:
    """Raises: EngineError: an empty text, one that is too long, or ids out of range."""
    for index, ids in enumerate(texts):
        param = f"input[{index}]"
        if not ids:
            raise EngineError("invalid_value", "a text must have at least one token", param)
        if len(ids) > info.max_model_len:
            raise EngineError(
                "context_length_exceeded",
                f"a text has {len(ids)} tokens, {info.model} takes at most {info.max_model_len}",
                param,
            )
        for token_id in ids:
            if not 0 <= token_id < info.vocab_size:
                raise EngineError(
                    "invalid_value",
                    f"token id {token_id}, allowed are 0 to {info.vocab_size - 1}",
                    param,
                )


def length_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices, shortest texts first, cut into batches that waste little on padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = batches and (
            len(batches[-1]) >= MAX_BATCH_TEXTS
            or (len(batches[-1]) + 1) * lengths[index] > MAX_BATCH_TOKENS
        )
        if not batches or full:
            batches.append([])
        batches[-1].append(index)
    return batches


def embed_result(vectors_BH: Tensor, num_tokens: int, *, normalize: bool) -> EmbedResult:
    vectors_BH = vectors_BH.float()
    if normalize:
        vectors_BH = torch.nn.functional.normalize(vectors_BH, dim=1)
    data = vectors_BH.contiguous().numpy().astype("<f4").tobytes()
    return EmbedResult(dim=vectors_BH.shape[1], vectors=data, num_tokens=num_tokens)


def rss_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
