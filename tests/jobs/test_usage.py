"""Counters per key: what is added is kept, by day and by process."""

import logging
import sqlite3
from pathlib import Path

import pytest

from engines.metering import EngineUse
from jobs.usage import Counters, UsageStore, total

DAY = 24 * 3600.0


def use(tenant: str = "k", **amounts: float) -> EngineUse:
    return EngineUse(tenant=tenant, model="m", operation="generate", **amounts)  # type: ignore[arg-type]


def test_what_is_added_adds_up(tmp_path: Path) -> None:
    store = UsageStore(tmp_path / "usage.db")
    store.used(use(num_requests=1, prompt_tokens=5))
    store.used(use(completion_tokens=3, prefix_hit_tokens=2, device_seconds=0.25))
    store.flush()
    store.used(use(num_requests=1, prompt_tokens=7, device_seconds=0.5))
    store.used(use("other", num_requests=1))
    store.used(use("", num_requests=1))  # the canary's
    (row,) = store.read("k")
    assert (row.key_id, row.model, row.operation) == ("k", "m", "generate")
    assert row.counters == Counters(
        requests=2, prompt_tokens=12, completion_tokens=3, prefix_hit_tokens=2, device_seconds=0.75
    )
    assert {row.key_id for row in store.read(None)} == {"k", "other"}
    assert total(store.read(None)).requests == 3
    store.close()
    assert total(UsageStore(tmp_path / "usage.db").read("k")).prompt_tokens == 12


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, two = (UsageStore(tmp_path / "usage.db") for _ in range(2))
    for store in (one, two, one):
        store.used(use(prompt_tokens=1))
        store.flush()
    assert total(two.read("k")).prompt_tokens == 3


def test_since_a_day(tmp_path: Path) -> None:
    now = [0.0]
    store = UsageStore(tmp_path / "usage.db", clock=lambda: now[0])
    for _ in range(3):
        store.used(use(prompt_tokens=1))
        now[0] += DAY
    assert [total(store.read("k", f"1970-01-0{day}")).prompt_tokens for day in (1, 2, 3, 4)] == [
        3,
        2,
        1,
        0,
    ]


def test_a_file_that_cannot_be_written_is_told_and_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.usage.BUSY_SECONDS", 0.01)
    store = UsageStore(tmp_path / "usage.db")
    store.used(use(prompt_tokens=1))
    store.flush()
    other = sqlite3.connect(tmp_path / "usage.db")
    other.execute("BEGIN IMMEDIATE")
    store.used(use(prompt_tokens=1))
    with caplog.at_level(logging.WARNING):
        store.flush()
    assert "usage could not be written" in caplog.text
    other.execute("ROLLBACK")
    other.close()
    assert total(store.read("k")).prompt_tokens == 2
