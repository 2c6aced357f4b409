"""How much memory a cache takes where nobody says."""

import pytest
import torch

from engines.memory import DEFAULT_KV_CACHE_BYTES, default_kv_cache_bytes


def test_on_a_gpu_it_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 2**30, 80 * 2**30))
    assert default_kv_cache_bytes(torch.device("cuda")) == 15 * 2**30


@pytest.mark.parametrize(("pages", "expected"), [(2**20, 2**30), (2**24, DEFAULT_KV_CACHE_BYTES)])
def test_on_a_cpu_it_is_little(monkeypatch: pytest.MonkeyPatch, pages: int, expected: int) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    assert default_kv_cache_bytes(torch.device("cpu")) == expected
