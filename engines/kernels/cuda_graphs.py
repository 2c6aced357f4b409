"""Decode steps as CUDA graphs: the whole pass is recorded once per number of rows and then launched as one.

A decode step of a small model is hundreds of launches that take the host longer to issue than the GPU to run; a graph
is one. What it recorded it repeats to the address, so a step's inputs are copied into buffers that stay where they are,
and a step of fewer rows than the graph is filled up: rows of padding write to block 0, which is nobody's, and read
nothing but it.

Only passes whose rows are one token of each request are recorded, and only where no operation waits for the device.

Shapes: R rows of a graph, one to a request; B blocks of the longest request; H hidden.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.kernels.metadata import BLOCK_SIZE, BatchMetadata, RequestRows, build_metadata
from engines.kernels.paged_attention import LayerCache

if TYPE_CHECKING:
    from engines.model import DecoderModel

ALIGNMENT = 4
"""Of each part of the input buffer, in int32: kernels are compiled for addresses that are multiples of 16 bytes."""
WARM_UP_TOKENS = (17, 33, 80)
"""Of prompts that are computed once while loading: a product of each kind and tile size that a prompt can need."""

Pass = Callable[[], Tensor]
Record = Callable[[Pass], Pass]
"""How a pass becomes something that can be repeated."""

logger = logging.getLogger("lathe.engine")


def row_counts(max_num_seqs: int) -> tuple[int, ...]:
    """For how many rows there is a graph: powers of two, then multiples of 8, up to every seat."""
    counts = {count for count in (1, 2, 4) if count < max_num_seqs}
    return tuple(sorted(counts | set(range(8, max_num_seqs, 8)) | {max_num_seqs}))


class StaticBatch:
    """The inputs of a decode step at addresses that stay: token ids and metadata of exactly `num_rows` rows.

    All of them lie in one buffer of int32, filled on the host and copied in one go.
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self._max_blocks = max_blocks
        sizes = [num_rows] * 4 + [num_rows * max_blocks]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(sum(padded), dtype=torch.int32, pin_memory=is_cuda)
        self._device = torch.zeros(sum(padded), dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

        def parts(buffer: Tensor) -> list[Tensor]:
            split = torch.split_with_sizes(buffer, padded)
            return [part[:size] for part, size in zip(split, sizes, strict=True)]

        *host_rows, host_tables = parts(self._host)
        self._host_rows = [rows.numpy() for rows in host_rows]
        self._host_tables_RB = host_tables.view(num_rows, max_blocks).numpy()
        ids_R, positions_R, slots_R, context_lens_R, tables = parts(self._device)
        self._ids_R, self._positions_R, self._slots_R = ids_R, positions_R, slots_R
        self._context_lens_R = context_lens_R
        self._tables_RB = tables.view(num_rows, max_blocks)
        self._query_start_R1 = torch.arange(num_rows + 1, dtype=torch.int32, device=device)

    def fill(self, token_ids: Sequence[int], requests: Sequence[RequestRows]) -> None:
        """Copy a step's inputs in; rows past the requests become padding."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before this may still read the host's buffer
        for rows in self._host_rows:
            rows.fill(0)
        ids, positions, slots, context_lens = self._host_rows
        context_lens.fill(1)  # padding sees its own key, in block 0
        self._host_tables_RB.fill(0)
        for row, (token_id, request) in enumerate(zip(token_ids, requests, strict=True)):
            table = request.block_table
            block, offset = divmod(request.start, BLOCK_SIZE)
            ids[row] = token_id
            positions[row] = request.start
            slots[row] = table[block] * BLOCK_SIZE + offset
            context_lens[row] = request.start + 1
            self._host_tables_RB[row, : len(table)] = table
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def token_ids(self) -> Tensor:
        """int64; part of what is recorded, as is `metadata`."""
        return self._ids_R.long()

    def metadata(self) -> BatchMetadata:
        return BatchMetadata(
            positions_T=self._positions_R.long(),
            slot_mapping_T=self._slots_R.long(),
            block_tables_SB=self._tables_RB,
            query_start_S1=self._query_start_R1,
            context_lens_S=self._context_lens_R,
            max_query_len=1,
        )


class DecodeGraphs:
    """Decode steps of up to `max_num_seqs` requests, recorded when made.

    Args:
        max_blocks: of the longest request that there can be.
    """

    def __init__(
        self,
        model: "DecoderModel",
        kv_cache: Sequence[LayerCache],
        *,
        max_num_seqs: int,
        max_blocks: int,
        record: Record,
    ) -> None:
        self._max_blocks = max_blocks
        self._batches: dict[int, StaticBatch] = {}
        self._passes: dict[int, Pass] = {}
        # The largest first: the memory that it reserves is enough for the others.
        for num_rows in reversed(row_counts(max_num_seqs)):
            batch = StaticBatch(num_rows, max_blocks, model.device)
            batch.fill([], [])
            self._batches[num_rows] = batch
            self._passes[num_rows] = record(_pass(model, kv_cache, batch))
        self._counts = row_counts(max_num_seqs)

    @property
    def kernel(self) -> str:
        """For `EngineInfo.kernels`."""
        return f"CUDA graphs of {', '.join(map(str, self._counts))} rows"

    def takes(self, token_ids: Sequence[int], requests: Sequence[RequestRows]) -> bool:
        """Whether a pass is a decode step: a token of each request, none of them an embedding row."""
        return (
            len(token_ids) == len(requests) <= self._counts[-1]
            and min(token_ids) >= 0
            and all(rows.num_tokens == 1 for rows in requests)
        )

    def forward(self, token_ids: Sequence[int], requests: Sequence[RequestRows]) -> Tensor:
        """Hidden states of a step that it `takes`; they are overwritten by the next call."""
        num_rows = next(count for count in self._counts if count >= len(token_ids))
        self._batches[num_rows].fill(token_ids, requests)
        return self._passes[num_rows]()[: len(token_ids)]


def _pass(model: "DecoderModel", kv_cache: Sequence[LayerCache], batch: StaticBatch) -> Pass:
    return lambda: model.forward(model.embed(batch.token_ids()), batch.metadata(), kv_cache)


class _Recorder:
    """Records passes as graphs that share one pool of memory: no two of them run at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Pass) -> Pass:
        # Compiles kernels and lets libraries make their workspaces, on a stream of its own as recording wants it.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


@torch.inference_mode()
def build_decode_graphs(
    model: "DecoderModel", kv_cache: Sequence[LayerCache], *, max_num_seqs: int, max_blocks: int
) -> DecodeGraphs | str:
    """The graphs for this model and cache, or why there are none. Compiles the kernels of prefill as well."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if not model.ops.is_recordable:
        return f"attention is {model.ops.kernels['attention']}"
    for wanted in WARM_UP_TOKENS:
        num_tokens = min(wanted, model.config.max_position_embeddings)
        table = [0] * -(-num_tokens // BLOCK_SIZE)
        prompt = RequestRows(start=0, num_tokens=num_tokens, block_table=table)
        ids_T = torch.zeros(num_tokens, dtype=torch.int64, device=model.device)
        model.forward(model.embed(ids_T), build_metadata([prompt], model.device), kv_cache)
    try:
        return DecodeGraphs(
            model,
            kv_cache,
            max_num_seqs=max_num_seqs,
            max_blocks=max_blocks,
            record=_Recorder(),
        )
    except RuntimeError as error:  # an operation that cannot be recorded, or no memory for it
        logger.warning("decode steps run without CUDA graphs", exc_info=error)
        return f"recording failed: {error}"
