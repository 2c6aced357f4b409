"""The local store: whole rows or none, one identity, and what forks, crashes and two openers may do to it."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lathe_client import EnrichmentStore, StoreMismatchError

ABOUT: dict[str, Any] = {
    "num_nodes": 10,
    "dim": 3,
    "encoder": "minilm",
    "origin": "graph-1 summary@1",
}


def indices(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def rows(*values: float) -> Any:
    return np.array([[value] * 3 for value in values], dtype=np.float32)


@pytest.fixture
def store(tmp_path: Path) -> EnrichmentStore:
    return EnrichmentStore(tmp_path / "deep" / "store", **ABOUT)


def test_what_was_written_is_found_and_the_rest_is_zeros(store: EnrichmentStore) -> None:
    assert store.write(indices(7, 2), rows(0.5, -2)) == 2
    vectors, there = store.lookup(indices(2, 3, 7, 2))
    assert there.tolist() == [True, False, True, True]
    assert vectors.tolist() == [[-2] * 3, [0] * 3, [0.5] * 3, [-2] * 3]
    assert vectors.dtype == np.float16
    assert (store.num_filled, store.dim, store.num_nodes) == (2, 3, 10)
    assert store.lookup(indices())[0].shape == (0, 3)


def test_a_row_keeps_its_first_value(store: EnrichmentStore) -> None:
    store.write(indices(1), rows(1))
    assert store.write(indices(1, 2), rows(9, 2)) == 1
    assert store.lookup(indices(1, 2))[0][:, 0].tolist() == [1, 2]


def test_it_outlives_its_process(store: EnrichmentStore) -> None:
    store.write(indices(4), rows(4))
    again = EnrichmentStore(store.path, **ABOUT)
    assert again.has(indices(4, 5)).tolist() == [True, False]
    assert EnrichmentStore.at(store.path).encoder == "minilm"
    assert pickle.loads(pickle.dumps(store)).num_filled == 1  # noqa: S301


@pytest.mark.parametrize(
    "other",
    [{"num_nodes": 11}, {"dim": 4}, {"encoder": "e5"}, {"origin": "graph-2"}, {"dtype": "float32"}],
)
def test_another_identity_is_refused(store: EnrichmentStore, other: dict[str, Any]) -> None:
    with pytest.raises(StoreMismatchError, match=next(iter(other))):
        EnrichmentStore(store.path, **{**ABOUT, **other})


def test_another_version_is_refused(store: EnrichmentStore) -> None:
    about = store.path / "store.json"
    about.write_text(about.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(StoreMismatchError, match="version is 2"):
        EnrichmentStore(store.path, **ABOUT)


def test_what_is_no_store_is_refused(tmp_path: Path, store: EnrichmentStore) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreMismatchError, match="no store"):
        EnrichmentStore(tmp_path / "empty", **ABOUT)
    os.truncate(store.path / "vectors.bin", 7)
    with pytest.raises(StoreMismatchError, match="no store"):
        EnrichmentStore.at(store.path)


def test_wrong_rows_are_refused_and_nothing_of_them_is_kept(store: EnrichmentStore) -> None:
    with pytest.raises(StoreMismatchError, match="3 wide"):
        store.write(indices(1), np.ones((1, 4)))
    with pytest.raises(ValueError, match="twice"):
        store.write(indices(1, 1), rows(1, 1))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            store.write(indices(1, 2), rows(1, bad))
    for beyond in (10, -1):
        with pytest.raises(IndexError):
            store.write(indices(beyond), rows(1))
    assert store.num_filled == 0
    with pytest.raises(ValueError, match="at least 1"):
        EnrichmentStore(store.path, **{**ABOUT, "dim": 0})


def test_half_a_row_is_no_row(store: EnrichmentStore) -> None:
    """What a crash between the row and its byte leaves."""
    with (store.path / "vectors.bin").open("r+b") as file:
        file.seek(3 * 3 * 2)
        file.write(np.full(3, 5, dtype=np.float16).tobytes())
    vectors, there = EnrichmentStore.at(store.path).lookup(indices(3))
    assert (there.tolist(), vectors.tolist()) == ([False], [[0, 0, 0]])
    assert store.write(indices(3), rows(1)) == 1
    assert store.lookup(indices(3))[0].tolist() == [[1, 1, 1]]


def _fill_in_child(store: EnrichmentStore, value: int) -> None:
    store.write(np.arange(10), rows(*[value] * 10))


def test_forked_processes_share_it(store: EnrichmentStore) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_fill_in_child, args=(store, i)) for i in range(1, 4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    vectors, there = store.lookup(np.arange(10))
    assert there.all()
    assert len(np.unique(vectors)) == 1  # one child was first, for all rows


def test_a_fork_while_it_is_locked_does_not_keep_the_lock(store: EnrichmentStore) -> None:
    child_ends, parent_ends = os.pipe()
    with store._locked():
        child = os.fork()
        if child == 0:
            os.close(parent_ends)
            os.read(child_ends, 1)  # until the parent closes its end
            os._exit(0)
    try:
        with (store.path / "store.json").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(parent_ends)
        os.waitpid(child, 0)
        os.close(child_ends)


def test_a_full_disk_is_an_error_and_fills_nothing(
    store: EnrichmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(indices(1), rows(1))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lathe_client.store.os.pwrite", full)
    with pytest.raises(OSError, match="No space"):
        store.write(indices(1, 2, 5), rows(9, 2, 5))
    monkeypatch.undo()
    vectors, there = store.lookup(indices(1, 2, 5))
    assert there.tolist() == [True, False, False]
    assert vectors[:, 0].tolist() == [1, 0, 0]
    assert store.write(indices(2, 5), rows(2, 5)) == 2


def test_a_disk_that_takes_a_part_of_a_row(
    store: EnrichmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(
        "lathe_client.store.os.pwrite", lambda file, data, at: pwrite(file, data[:4], at)
    )
    store.write(indices(9, 3, 4), rows(9, 3, 4))
    assert store.lookup(indices(3, 4, 9))[0].tolist() == [[3] * 3, [4] * 3, [9] * 3]


def test_a_file_system_that_fills_up_does_not_end_the_process(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)],
        check=False,
        capture_output=True,
    ).returncode:
        pytest.skip("no file system can be mounted here")
    code = (
        "import sys, numpy as np\n"
        "from lathe_client import EnrichmentStore\n"
        "store = EnrichmentStore(sys.argv[1], num_nodes=4000, dim=512, encoder='e')\n"
        "try:\n"
        "    for node in range(0, 4000, 100):\n"
        "        store.write(np.arange(node, node + 100), np.ones((100, 512)))\n"
        "except OSError as error:\n"
        "    vectors, there = store.lookup(np.arange(4000))\n"
        "    assert (vectors[:, 0] == there).all()\n"
        "    print(error.strerror, store.num_filled)\n"
    )
    try:
        command = [sys.executable, "-c", code, str(tmp_path / "s")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (done.returncode, done.stdout.split()[:3]) == (0, ["No", "space", "left"]), done.stderr
    assert 0 < int(done.stdout.split()[-1]) <= 1000


def test_two_creators_get_one_store(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from lathe_client import EnrichmentStore\n"
        f"store = EnrichmentStore(sys.argv[1], **{ABOUT!r})\n"
        "store.write(np.array([int(sys.argv[2])]), np.ones((1, 3)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    children = [subprocess.Popen([*command, str(i)]) for i in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert EnrichmentStore.at(tmp_path / "s").has(indices(0, 1)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
