"""Sentence encoders (BERT and its kin) as an engine that only embeds: attention-masked mean pooling, then L2 norm.

This is the recipe published with all-MiniLM-L6-v2. Weights stay in float32: lower precision moves the
vectors, and vectors of
two precisions must not meet in one store. A text longer than the model was trained for is refused, not cut in silence.

Shapes: B texts, S tokens, H hidden.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.protocol import (
    EmbedRequest,
    EmbedResult,
    EngineError,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    ScoreRequest,
    ScoreResult,
    TokenOutput,
)

_NO_GENERATION = "this model is an encoder: it embeds and cannot generate or score"


class EncoderEngine:
    """An `Engine` without decoding."""

    def __init__(self, model: Any, info: EngineInfo) -> None:
        self._model = model
        self._info = info
        self._num_tokens = 0

    @classmethod
    def load(cls, model_id: str, folder: Path) -> "EncoderEngine":
        from compression.checkpoint import checkpoint_hash, read_manifest
        from compression.hf import kernels, load_model, resident_bytes

        start = time.monotonic()
        manifest = read_manifest(folder)
        model = load_model(folder, dtype=torch.float32)
        info = EngineInfo(
            model=model_id,
            kind="encoder",
            engine="encoder",
            checkpoint_hash=checkpoint_hash(manifest),
            vocab_size=model.config.vocab_size,
            hidden_size=model.config.hidden_size,
            max_model_len=int(manifest.text["max_length"]),
            eos_token_ids=(),
            max_num_seqs=32,
            device="cpu",
            dtype="float32",
            resident_bytes=resident_bytes(model),
            load_seconds=time.monotonic() - start,
            kernels=kernels(model),
        )
        return cls(model, info)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @torch.inference_mode()
    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Vectors in request order; texts of like length share a forward pass.

        Raises:
            EngineError: another pooling than the model's own, an empty text, or one that is too long.
        """
        if request.pooling not in ("default", "mean"):
            raise EngineError("invalid_value", "an encoder pools by mean only", "pooling")
        for index, ids in enumerate(request.token_ids):
            check_text(ids, self._info, f"input[{index}]")
        vectors_BH = torch.empty(len(request.token_ids), self._info.hidden_size)
        for same_length in _by_length(request.token_ids):
            ids_BS = torch.tensor([request.token_ids[index] for index in same_length])
            hidden_BSH = self._model(ids_BS, attention_mask=torch.ones_like(ids_BS))
            vectors_BH[same_length] = hidden_BSH.last_hidden_state.mean(dim=1)
        num_tokens = sum(len(ids) for ids in request.token_ids)
        self._num_tokens += num_tokens
        return embed_result(vectors_BH, num_tokens, normalize=request.normalize)

    def submit(self, request: GenerateRequest) -> None:
        raise EngineError("invalid_value", _NO_GENERATION, "model")

    def score(self, request: ScoreRequest) -> ScoreResult:
        raise EngineError("invalid_value", _NO_GENERATION, "model")

    def abort(self, request_id: str) -> None:
        return

    def has_work(self) -> bool:
        return False

    def step(self) -> list[TokenOutput]:
        return []

    def sleep(self) -> None:
        raise EngineError("invalid_value", "an encoder does not sleep: unload it", "model")

    def wake(self) -> None:
        return

    def close(self) -> None:
        return

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=0,
            num_requests_waiting=0,
            kv_cache_usage_ratio=0.0,
            prompt_tokens_total=self._num_tokens,
            generation_tokens_total=0,
            preemptions_total=0,
            prefix_cache_queries_total=0,
            prefix_cache_hits_total=0,
            ffn_rows_skipped_total=0,
            ffn_rows_total=0,
            last_output_at=None,
            sleeping=False,
            rss_bytes=rss_bytes(),
        )


def check_text(ids: tuple[int, ...], info: EngineInfo, param: str) -> None:
    """Raises: EngineError: the text is empty, too long, or has ids out of range."""
    if not ids:
        raise EngineError("invalid_value", "a text must have at least one token", param)
    if len(ids) > info.max_model_len:
        raise EngineError(
            "context_length_exceeded",
            f"a text has {len(ids)} tokens, {info.model} holds at most {info.max_model_len}",
            param,
        )
    if not all(0 <= token_id < info.vocab_size for token_id in ids):
        raise EngineError("invalid_value", f"token ids must be in [0, {info.vocab_size})", param)


def _by_length(token_ids: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    """Indices grouped by exact length: no padding, so a vector does not depend on its company's length."""
    groups: dict[int, list[int]] = {}
    for index, ids in enumerate(token_ids):
        groups.setdefault(len(ids), []).append(index)
    return list(groups.values())


def embed_result(vectors_BH: Tensor, num_tokens: int, *, normalize: bool) -> EmbedResult:
    vectors_BH = vectors_BH.float()
    if normalize:
        vectors_BH = torch.nn.functional.normalize(vectors_BH, dim=1)
    data = vectors_BH.contiguous().numpy().astype("<f4").tobytes()
    return EmbedResult(dim=vectors_BH.shape[1], vectors=data, num_tokens=num_tokens)


def rss_bytes() -> int:
    """Resident memory of this process (Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
