"""The enrichment cache: layers, least recently used first, and no damage that is more than a miss."""

import logging
import sqlite3
from pathlib import Path

import pytest

from graph.cache import EnrichmentCache


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


def test_what_is_put_is_got(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.db"
    a, b = keys(1, 2)
    cache = EnrichmentCache(path)
    assert cache.get_many("text", [a, b]) == {}
    cache.put_many("text", {a: b"value", b: b""})
    cache.put_many("embedding", {a: b"vector"})
    assert cache.get_many("text", [a, b, a]) == {a: b"value", b: b""}
    assert cache.get_many("embedding", [a, b]) == {a: b"vector"}
    cache.close()
    assert EnrichmentCache(path).get_many("text", [a]) == {a: b"value"}


def test_the_first_value_stays(tmp_path: Path) -> None:
    cache = EnrichmentCache(tmp_path / "cache.db")
    (key,) = keys(1)
    cache.put_many("text", {key: b"first"})
    cache.put_many("text", {key: b"second"})
    assert cache.get_many("text", [key]) == {key: b"first"}


def test_many_keys(tmp_path: Path) -> None:
    cache = EnrichmentCache(tmp_path / "cache.db")
    values = {key: key[-2:] for key in keys(*range(1201))}
    cache.put_many("text", values)
    assert cache.get_many("text", values) == values


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = EnrichmentCache(tmp_path / "cache.db", max_bytes=10 * 1100)
    names = keys(*range(10))
    for key in names[:9]:
        cache.put_many("text", {key: bytes(1000)})
    assert len(cache.get_many("text", names[:9])) == 9
    cache.get_many("text", names[:2])  # used again
    for key in keys(20, 21):
        cache.put_many("text", {key: bytes(1000)})
    left = cache.get_many("text", [*names, *keys(20, 21)])
    assert set(names[:2]) < set(left)
    assert set(keys(20, 21)) < set(left)
    assert names[2] not in left
    assert len(left) <= 9


def test_a_corrupted_row_is_a_miss_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.db"
    cache = EnrichmentCache(path)
    a, b = keys(1, 2)
    cache.put_many("text", {a: b"value", b: b"other"})
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET value = x'0011223344' WHERE key = ?", (a,))
    connection.close()
    with caplog.at_level(logging.WARNING):
        assert cache.get_many("text", [a, b]) == {b: b"other"}
    assert "corrupted cache rows: 1" in caplog.text
    cache.put_many("text", {a: b"again"})
    assert cache.get_many("text", [a]) == {a: b"again"}


def test_a_file_that_is_no_database_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.db"
    path.write_bytes(b"not a database " * 100)
    cache = EnrichmentCache(path)
    (key,) = keys(1)
    with caplog.at_level(logging.WARNING):
        cache.put_many("text", {key: b"value"})
    assert "starting anew" in caplog.text
    assert cache.get_many("text", [key]) == {key: b"value"}


def test_a_cache_that_cannot_be_written_fails_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache.db").mkdir()
    cache = EnrichmentCache(tmp_path / "cache.db")
    (key,) = keys(1)
    with caplog.at_level(logging.WARNING):
        cache.put_many("text", {key: b"value"})
        assert cache.get_many("text", [key]) == {}
    assert "cache write failed" in caplog.text


def test_two_processes_may_share_it(tmp_path: Path) -> None:
    one, two = EnrichmentCache(tmp_path / "cache.db"), EnrichmentCache(tmp_path / "cache.db")
    (key,) = keys(1)
    one.put_many("text", {key: b"value"})
    assert two.get_many("text", [key]) == {key: b"value"}
