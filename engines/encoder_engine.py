"""Sentence encoders (BERT and its kin) as an engine that only embeds: masked mean over tokens, then L2 norm.

That is the recipe published with all-MiniLM-L6-v2 (sentence-transformers' Pooling and Normalize modules). Weights
stay in float32: lower precision moves the vectors, and vectors of two precisions must not meet in one store. A text
longer than the encoder was trained for is refused: whoever wants it cut cuts it.

Shapes: B texts, S tokens, H hidden.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

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
from engines.vectors import MAX_BATCH_TEXTS, check_texts, embed_result, length_batches, rss_bytes

_NO_GENERATION = "is an encoder: it embeds, and can not generate or score"


class EncoderEngine:
    """An `Engine` without decoding.

    Args:
        load: makes the model, in float32 and eval mode; called now, and again by `wake`.
        max_length: tokens of the longest text it takes, special tokens included.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        model_id: str,
        max_length: int,
        checkpoint_hash: str = "",
    ) -> None:
        from compression.hf import kernels, resident_bytes

        start = time.monotonic()
        self._load = load
        self._model: Any = load()
        self._num_tokens = 0
        self._last_output_at: float | None = None
        config = self._model.config
        self._info = EngineInfo(
            model=model_id,
            kind="encoder",
            engine="encoder",
            checkpoint_hash=checkpoint_hash,
            vocab_size=int(config.vocab_size),
            hidden_size=int(config.hidden_size),
            max_model_len=min(max_length, int(config.max_position_embeddings)),
            eos_token_ids=(),
            max_num_seqs=MAX_BATCH_TEXTS,
            device=str(self._model.device),
            dtype=str(self._model.dtype).removeprefix("torch."),
            resident_bytes=resident_bytes(self._model),
            load_seconds=time.monotonic() - start,
            kernels=kernels(self._model),
        )

    @classmethod
    def load(
        cls, model_id: str, folder: Path, *, device: Literal["auto", "cpu", "cuda"] = "auto"
    ) -> "EncoderEngine":
        """Load a Lathe checkpoint.

        Raises:
            CheckpointError
        """
        from compression.checkpoint import checkpoint_hash, read_manifest
        from compression.hf import load_model

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        manifest = read_manifest(folder)
        return cls(
            lambda: load_model(folder, dtype=torch.float32, device=device),
            model_id=model_id,
            max_length=int(manifest.text["max_length"]),
            checkpoint_hash=checkpoint_hash(manifest),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @torch.inference_mode()
    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Vectors in request order.

        Raises:
            EngineError: another pooling than the mean, an empty text, one that is too long, or asleep.
        """
        if self._model is None:
            raise EngineError("sleeping", f"{self._info.model} is asleep")
        if request.pooling not in ("default", "mean"):
            raise EngineError(
                "invalid_value",
                f"pooling is {request.pooling!r}; {self._info.model} was trained for 'mean'",
                "pooling",
            )
        check_texts(self._info, request.token_ids)
        vectors_BH = torch.zeros(len(request.token_ids), self._info.hidden_size)
        for indices in length_batches([len(ids) for ids in request.token_ids]):
            vectors_BH[indices] = self._mean([request.token_ids[index] for index in indices])
        num_tokens = sum(len(ids) for ids in request.token_ids)
        self._num_tokens += num_tokens
        self._last_output_at = time.monotonic()
        return embed_result(vectors_BH, num_tokens, normalize=request.normalize)

    def _mean(self, texts: list[tuple[int, ...]]) -> Tensor:
        """(B, H)"""
        texts_S = [torch.tensor(ids) for ids in texts]
        ids_BS = torch.nn.utils.rnn.pad_sequence(texts_S, batch_first=True)
        lengths_B = torch.tensor([len(ids) for ids in texts])
        mask_BS = (torch.arange(ids_BS.shape[1])[None] < lengths_B[:, None]).to(self._model.device)
        output = self._model(input_ids=ids_BS.to(self._model.device), attention_mask=mask_BS.long())
        hidden_BSH: Tensor = output.last_hidden_state
        return ((hidden_BSH * mask_BS[..., None]).sum(1) / mask_BS.sum(1, keepdim=True)).cpu()

    def submit(self, request: GenerateRequest) -> None:
        raise EngineError("invalid_value", f"{self._info.model} {_NO_GENERATION}", "model")

    def score(self, request: ScoreRequest) -> ScoreResult:
        raise EngineError("invalid_value", f"{self._info.model} {_NO_GENERATION}", "model")

    def abort(self, request_id: str) -> None:
        """Nothing runs between two calls."""

    def has_work(self) -> bool:
        return False

    def step(self) -> list[TokenOutput]:
        return []

    def sleep(self) -> None:
        self._model = None
        gc.collect()

    def wake(self) -> None:
        if self._model is None:
            self._model = self._load()

    def close(self) -> None:
        """Nothing runs in the background."""

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
            last_output_at=self._last_output_at,
            sleeping=self._model is None,
            rss_bytes=rss_bytes(),
        )
