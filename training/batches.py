"""Rows of examples as tensors, and the loss over their learnt tokens.

Examples that share a row do not see each other: positions begin anew with each, and the mask is causal within it.
Padding follows the last and sees itself alone, since a row of a softmax that sees nothing is not a number.

Shapes: N rows, S tokens of the longest, V vocabulary, T learnt tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.data import Row

NOT_LEARNT = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Attributes:
    labels_NS: the id that follows where it is learnt, else NOT_LEARNT.
    mask_N1SS: True where a query sees a key.
    num_tokens: without padding; num_learnt: labels.
    """

    ids_NS: Tensor
    positions_NS: Tensor
    labels_NS: Tensor
    mask_N1SS: Tensor
    num_tokens: int
    num_learnt: int


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    length = max(sum(len(example.ids) for example in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    positions, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, NOT_LEARNT)
    num_tokens = 0
    for index, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, start=1):
            end = start + len(example.ids)
            ids[index, start:end] = torch.tensor(example.ids)
            positions[index, start:end] = torch.arange(end - start)
            segments[index, start:end] = number
            following = [
                token if learnt else NOT_LEARNT
                for token, learnt in zip(example.ids[1:], example.learnt[1:], strict=True)
            ]
            labels[index, start : end - 1] = torch.tensor(following, dtype=torch.int64)
            start = end
        num_tokens += start
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    padding = segments == 0
    mask = same & causal & ~padding[:, None, :]
    mask |= torch.eye(length, dtype=torch.bool)
    return Batch(
        ids_NS=ids.to(device),
        positions_NS=positions.to(device),
        labels_NS=labels.to(device),
        mask_N1SS=mask[:, None].to(device),
        num_tokens=num_tokens,
        num_learnt=int((labels != NOT_LEARNT).sum()),
    )


def total_loss(model: Any, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihoods of the learnt tokens, float32."""
    logits_NSV = model(
        input_ids=batch.ids_NS,
        position_ids=batch.positions_NS,
        attention_mask=batch.mask_N1SS,
        use_cache=False,
    ).logits
    learnt = batch.labels_NS != NOT_LEARNT
    logits_TV = logits_NSV[learnt].float()
    return F.cross_entropy(logits_TV, batch.labels_NS[learnt], reduction="sum")


class SavedBytes:
    """Counts what autograd keeps for the backward pass while it is entered, each storage once.

    What a checkpointed block keeps is its input: its inside is computed again and not counted.

    Attributes:
        num_bytes: storages, those of the model's own tensors excepted.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())
