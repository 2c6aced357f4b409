"""Who runs next, by hand and under random operations on a cache of 4 blocks of 4 tokens."""

import random
from collections import Counter
from typing import Any

import pytest

from engines.kv_cache import BlockManager
from engines.protocol import EngineError
from engines.scheduler import AGEING_SECONDS, Chunk, ScheduledRequest, Scheduler, rank

BLOCK_SIZE = 4


def _scheduler(num_blocks: int = 4, **limits: int) -> Scheduler:
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 8, "max_num_waiting": 100} | limits
    return Scheduler(BlockManager(num_blocks + 1), block_size=BLOCK_SIZE, **limits)


def _request(number: int, num_tokens: int, priority: int = 0, **fields: Any) -> ScheduledRequest:
    """Arrives at second `number`; no two prompts share a block unless told to."""
    fields = {"token_ids": [1000 * number + index for index in range(num_tokens)]} | fields
    return ScheduledRequest(
        request_id=str(number), rank=rank(priority, float(number), number), **fields
    )


def _step(scheduler: Scheduler) -> dict[str, int]:
    """Run a step that gives token 7 to whoever is due one. Returns the chunks."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        is_last = chunk.is_last
        scheduler.advance(chunk)
        if is_last:
            scheduler.append(chunk.request, 7)
    return {chunk.request.request_id: chunk.num_tokens for chunk in chunks}


def test_prompts_are_cut_and_decoding_goes_on() -> None:
    scheduler = _scheduler(num_blocks=20)
    scheduler.add(_request(0, 3))
    assert _step(scheduler) == {"0": 3}
    scheduler.add(_request(1, 18))
    scheduler.add(_request(2, 4))
    # one token to 0, half of the other seven to the older prompt, and what the shorter leaves
    assert _step(scheduler) == {"0": 1, "1": 4, "2": 3}
    assert _step(scheduler) == {"0": 1, "2": 1, "1": 6}
    assert _step(scheduler) == {"0": 1, "2": 1, "1": 6}
    assert _step(scheduler) == {"0": 1, "2": 1, "1": 2}
    assert _step(scheduler) == {"0": 1, "2": 1, "1": 1}


def test_priority_goes_first_and_age_makes_up_for_it() -> None:
    scheduler = _scheduler(num_blocks=20, max_num_seqs=1, max_num_batched_tokens=8)
    handicap = int(AGEING_SECONDS)
    scheduler.add(_request(0, 2, priority=1))
    scheduler.add(_request(handicap - 1, 2))
    scheduler.add(_request(handicap + 1, 2))
    order = []
    for _ in range(3):
        (name,) = _step(scheduler)
        order.append(int(name))
        scheduler.remove(name)
    assert order == [handicap - 1, 0, handicap + 1]


def test_a_prefix_is_computed_once() -> None:
    scheduler = _scheduler(num_blocks=20)
    prompt = list(range(10))
    scheduler.add(_request(0, 0, token_ids=[*prompt]))
    assert _step(scheduler) == {"0": 8}
    assert _step(scheduler) == {"0": 2}
    others: tuple[dict[str, Any], ...] = ({}, {"tenant": "other"}, {"finds_prefix": False})
    for number, fields in enumerate(others, start=1):
        scheduler.remove(str(number - 1))
        scheduler.add(_request(number, 0, token_ids=[*prompt], **fields))
        chunks = scheduler.schedule()
        assert [chunk.request.num_cached_tokens for chunk in chunks] == [8 if number == 1 else 0]
    assert scheduler.num_queried_tokens == 40
    assert scheduler.num_hit_tokens == 8


def test_the_last_token_is_always_computed() -> None:
    scheduler = _scheduler(num_blocks=20)
    scheduler.add(_request(0, 0, token_ids=[*range(8)]))
    _step(scheduler)
    scheduler.add(_request(1, 0, token_ids=[*range(8)]))
    assert _step(scheduler)["1"] == 4


def test_other_rows_make_another_prefix() -> None:
    scheduler = _scheduler(num_blocks=20)
    for number, rows in enumerate((b"aabbccddee", b"aabbccddff", b"aabbccxxff")):
        token_ids = [1, -1, 2, -1, -1, 3, -1, 4, -1]
        scheduler.add(_request(number, 0, token_ids=token_ids, embedding_rows=rows, row_bytes=2))
        (chunk,) = scheduler.schedule()
        assert chunk.request.num_cached_tokens == (0, 8, 4)[number]
        assert chunk.request.rows_between(2, 7) == rows[2:8]
        while chunk.request.num_left:
            scheduler.advance(Chunk(chunk.request, min(8, chunk.request.num_left)))
        scheduler.remove(str(number))


def test_the_worst_ranked_gives_way_and_comes_back() -> None:
    scheduler = _scheduler(num_blocks=4)
    scheduler.add(_request(0, 4))
    scheduler.add(_request(1, 4, priority=3))
    assert _step(scheduler) == {"0": 4, "1": 4}
    scheduler.add(_request(2, 4))
    # each of both takes its second block; the third waits, and the cache is full
    for _ in range(4):
        assert _step(scheduler) == {"0": 1, "1": 1}
    assert scheduler.num_preemptions == 0
    # 0 needs its third block: 1 is preempted, and 2 is admitted before it
    assert _step(scheduler) == {
        "0": 1,
    }
    assert scheduler.num_preemptions == 1
    assert scheduler.num_waiting == 2
    scheduler.remove("0")
    assert list(_step(scheduler)) == ["2"]


def test_room_is_made_by_preemption() -> None:
    scheduler = _scheduler(num_blocks=4)
    for number in range(2):
        scheduler.add(_request(number, 4))
    _step(scheduler)
    scheduler.make_room(3)
    assert scheduler.blocks.num_free == 3
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_limits_are_refused_by_name() -> None:
    scheduler = _scheduler(max_num_waiting=2)
    scheduler.add(_request(0, 2))
    scheduler.check_queue()
    with pytest.raises(EngineError):
        scheduler.check_queue(num_others=1)
    scheduler.add(_request(1, 2))
    with pytest.raises(EngineError) as caught:
        scheduler.check_queue()
    assert caught.value.code == "queue_full"
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        _scheduler(max_num_seqs=9)


def _random_operations(seed: int) -> Scheduler:
    """Requests come, are aborted, share beginnings and outgrow the cache, until nobody is left."""
    choose = random.Random(seed)
    scheduler = _scheduler()
    to_come = [
        _request(
            number,
            0,
            priority=choose.randrange(3),
            token_ids=[
                choose.randrange(1, 1 + number % 3 + 1) for _ in range(choose.randint(1, 12))
            ],
            tenant=choose.choice(["", "other"]),
        )
        for number in range(40)
    ]
    max_length = {r.request_id: choose.randint(len(r.token_ids) + 1, 16) for r in to_come}
    alive: dict[str, ScheduledRequest] = {}
    finished: Counter[str] = Counter()
    num_aborted = 0
    for _ in range(2000):
        if to_come and choose.random() < 0.4:
            request = to_come.pop(0)
            scheduler.add(request)
            alive[request.request_id] = request
        if alive and choose.random() < 0.02:
            gone = choose.choice(list(alive))
            scheduler.remove(gone)
            del alive[gone]
            num_aborted += 1
        chunks = scheduler.schedule()
        assert bool(chunks) == bool(alive)
        assert sum(chunk.num_tokens for chunk in chunks) <= 8
        assert len({id(chunk.request) for chunk in chunks}) == len(chunks) <= 3
        for chunk in chunks:
            request = chunk.request
            end = request.num_computed_tokens + chunk.num_tokens
            assert 0 < chunk.num_tokens <= request.num_left
            assert end <= len(request.block_table) * BLOCK_SIZE
            # A block that is written to is nobody else's.
            written = request.block_table[request.num_computed_tokens // BLOCK_SIZE :]
            for other in alive.values():
                if other is not request:
                    assert not set(written) & set(other.block_table)
        for chunk in chunks:
            is_last = chunk.is_last
            scheduler.advance(chunk)
            request = chunk.request
            if is_last:
                scheduler.append(request, choose.randrange(2))
                if len(request.token_ids) == max_length[request.request_id]:
                    scheduler.remove(request.request_id)
                    del alive[request.request_id]
                    finished[request.request_id] += 1
        held = {block for request in alive.values() for block in request.block_table}
        assert len(held) + scheduler.blocks.num_free == scheduler.blocks.num_usable == 4
        if not alive and not to_come:
            break
    assert not alive
    assert len(finished) + num_aborted == 40
    assert set(finished.values()) == {1}
    return scheduler


def test_everybody_finishes_on_four_blocks_of_four() -> None:
    """And nothing is lost or owned twice on the way."""
    schedulers = [_random_operations(seed) for seed in range(20)]
    assert min(scheduler.num_preemptions for scheduler in schedulers) > 0
    assert sum(scheduler.num_hit_tokens for scheduler in schedulers) > 100
