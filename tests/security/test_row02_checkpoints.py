"""Row 2: checkpoints from anybody: pickles are not read, headers are checked before anything is mapped, and what
expands is stopped. A broken model is an error of its own, and no other model's."""

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.checkpoint import open_checkpoint, verify_checkpoint
from compression.import_model import import_folder
from compression.registry import ModelRegistry
from compression.safetensors_header import CheckpointError, read_header
from jobs.file_check import MAX_CALIBRATION_BYTES, FileContentError, check_file
from service.app import build_app
from service.errors import ApiError
from service.settings import Settings
from service.tokenizers import load_text
from tests.security.conftest import check_error, make_home
from tests.security.test_row01_deserialisation import Canary
from training.checkpointing import CheckpointFolder, RunCheckpoint


def safetensors(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(shape: list[Any], start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE_HEADERS: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "length of 2**63": struct.pack("<Q", 2**63) + b"{}",
    "length of all ones": b"\xff" * 8 + b"{}",
    "length beyond the file": struct.pack("<Q", 100) + b"{}",
    "length of the lengths' own bytes": struct.pack("<Q", 10) + b"{}",
    "zero length": struct.pack("<Q", 0),
    "a huge header": struct.pack("<Q", 65 * 2**20) + b" " * 1000,
    "not JSON": safetensors(b"{x"),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "a list": safetensors([]),
    "deep": safetensors(b"[" * 200_000),
    "deep objects": safetensors(b'{"a":' * 100_000),
    "a long integer": safetensors(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
    "overlap": safetensors({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"\0" * 12),
    "the same bytes twice": safetensors({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, b"\0" * 8),
    "a gap": safetensors({"a": tensor([2], 4, 12)}, b"\0" * 12),
    "beyond the end": safetensors({"a": tensor([4], 0, 16)}, b"\0" * 8),
    "less than the data": safetensors({"a": tensor([1], 0, 4)}, b"\0" * 8),
    "a negative size": safetensors({"a": tensor([-1], 0, -4)}),
    "two negative sizes": safetensors({"a": tensor([-1, -1], 0, 4)}, b"\0" * 4),
    "a negative offset": safetensors({"a": tensor([1], -4, 0)}, b"\0" * 4),
    "end before start": safetensors({"a": tensor([1], 4, 0)}, b"\0" * 4),
    "sizes that overflow": safetensors({"a": tensor([2**33, 2**33], 0, 4)}, b"\0" * 4),
    "a size that is true": safetensors({"a": tensor([True], 0, 4)}, b"\0" * 4),
    "a size of 1.0": safetensors({"a": tensor([1.0], 0, 4)}, b"\0" * 4),
    "a size of NaN": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
    "an unknown dtype": safetensors({"a": tensor([1], 0, 4, "F31")}, b"\0" * 4),
    "a dtype that is a list": safetensors({"a": tensor([1], 0, 4, ["F32"])}, b"\0" * 4),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4),
    "three offsets": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, b"\0" * 4),
    "no description": safetensors({"a": None}),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


@given(header=st.binary(max_size=300), data=st.binary(max_size=64))
def test_no_bytes_do_anything_else(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    for content in (safetensors(header, data), header + data):
        path.write_bytes(content)
        try:
            tensors = read_header(path)
        except CheckpointError:
            continue
        assert sum(info.num_bytes for info in tensors.values()) <= len(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
ENTRY = JSON | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "I64", "x", None]),
        "shape": JSON | st.lists(st.integers(-2, 2**50), max_size=3),
        "data_offsets": JSON | st.lists(st.integers(-8, 80), min_size=2, max_size=2),
    }
)


@settings(max_examples=200)
@given(header=st.dictionaries(st.text(max_size=8), ENTRY, max_size=4), data=st.binary(max_size=64))
def test_no_header_makes_more_of_a_file_than_it_has(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(safetensors(header, data))
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert sum(info.num_bytes for info in tensors.values()) == len(data)


def copy_with(
    tiny_llama: Path, folder: Path, change: Callable[[Path], None]
) -> tuple[ModelRegistry, Path]:
    shutil.copytree(tiny_llama, folder)
    change(folder)
    return ModelRegistry(folder.parent / "models"), folder


def only_pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Canary(folder.parent / "ran")))

    return change


def zip_as_weights(folder: Path) -> None:
    """torch.save's own container, of 1 GiB of zeros in a megabyte."""
    with zipfile.ZipFile(folder / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w") as member:
            member.write(pickle.dumps(Canary(folder.parent / "ran")))
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**20))


def link_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/etc/passwd")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only_pickled("pytorch_model.bin"), "is a pickle and is not read"),
        (only_pickled("model.pt"), "is a pickle and is not read"),
        (only_pickled("model.ckpt"), "is a pickle and is not read"),
        (zip_as_weights, "does not fit the file"),
        (link_out("tokenizer.json"), "links out"),
        (link_out("model.safetensors"), "links out"),
        (link_out("anything"), "links out"),
        (lambda f: (f / "config.json").write_bytes(b"[" * 200_000) and None, "is not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"[]") and None, "is not an object"),
        (lambda f: (f / "config.json").write_bytes(b"\xff{}") and None, "is not JSON"),
        (
            lambda f: (f / "model.safetensors").write_bytes(HOSTILE_HEADERS["overlap"]) and None,
            "overlaps",
        ),
    ],
)
def test_a_hostile_folder_is_not_imported(
    tiny_llama: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    registry, folder = copy_with(tiny_llama, tmp_path / "hostile", change)
    with pytest.raises(CheckpointError, match=message):
        import_folder(registry, "hostile", folder, report=lambda _: None)
    assert registry.list_models() == []
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_weights_is_neither_read_nor_copied(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def change(folder: Path) -> None:
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
            (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))

    registry, folder = copy_with(tiny_llama, tmp_path / "mixed", change)
    import_folder(registry, "mixed", folder, report=lambda _: None)
    names = {path.suffix for path in registry.get("mixed").path.iterdir()}
    assert names <= {".json", ".safetensors", ".jinja", ".txt"}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"[" * 200_000, b'{"format_version": 99}', b'{"format_version": []}',
        b'{"format_version": 3, "matrices": 1, "other_tensors": {}}', b"\xff\xfe",
        b'{"format_version": 3, "matrices": [{"kind": []}], "other_tensors": {}}',
        b'{"format_version": 3, "matrices": [], "other_tensors": {"a": 1}}',
        b'{"format_version": ' + b"9" * 5000 + b"}",
    ],
    ids=range(12),
)  # fmt: skip
def test_a_broken_manifest_is_that_models_error_alone(
    home: Path, tmp_path: Path, content: bytes
) -> None:
    shutil.copytree(home, tmp_path / "home")
    broken = tmp_path / "home" / "models" / "broken"
    shutil.copytree(home / "models" / "tiny", broken)
    (broken / "lathe.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        open_checkpoint(broken)
    assert not verify_checkpoint(broken).ok
    app = build_app(Settings(home=tmp_path / "home", models=("tiny",)))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
        ask = {"model": "broken", "prompt": "a"}
        assert check_error(client.post("/v1/completions", json=ask), 500) == "model_load_failed"
        assert check_error(client.get("/v1/models/broken"), 500) == "model_load_failed"


def test_a_changed_file_is_found(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(home / "models" / "tiny", folder)
    assert verify_checkpoint(folder).ok
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "sha256 differs" in verify_checkpoint(folder).problems[0]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 200_000, b"\xff", b'{"model": {"type": "BPE"}}']
)
def test_a_broken_tokenizer_is_an_error(home: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(home / "models" / "tiny", tmp_path / "models" / "tiny")
    (tmp_path / "models" / "tiny" / "tokenizer.json").write_bytes(content)
    with pytest.raises(ApiError, match="cannot be read"):
        load_text(ModelRegistry(tmp_path / "models").get("tiny"))


def test_a_job_resumes_from_safetensors_and_json_alone(tmp_path: Path) -> None:
    """A newer step whose files are pickles is passed over, and not run."""
    import torch

    folder = CheckpointFolder(tmp_path / "work", ["run"])
    for step in (1, 2):
        checkpoint = RunCheckpoint(
            step=step,
            weights={"w": torch.ones(2)},
            optimizer={"m": torch.ones(2)},
            state={"s": step},
        )
        folder.save(checkpoint, keep=set(), keep_last=5)
    for path in folder._path(2).iterdir():
        path.write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    newest = CheckpointFolder(tmp_path / "work", ["run"]).newest_sound()
    assert newest is not None
    assert newest.state == {"s": 1}
    assert not (tmp_path / "ran").exists()


def test_a_parquet_file_that_expands_is_stopped(tmp_path: Path) -> None:
    """Ten thousand rows of one text of a megabyte: 60 kB of file, ten gigabytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bomb = tmp_path / "bomb.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), ["a" * 2**20])
    pq.write_table(pa.table({"text": texts}), bomb, compression="zstd")
    assert bomb.stat().st_size < 2**20
    before = pa.total_allocated_bytes()
    with pytest.raises(FileContentError, match=f"at most {MAX_CALIBRATION_BYTES} bytes"):
        check_file(bomb, "calibration")
    assert pa.default_memory_pool().max_memory() - before < 2**30


def test_a_real_parquet_file_reads_as_before(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jobs.file_check import read_texts

    texts = ["one", "two", "", "one", "\u00e9" * 9]
    for column in (
        pa.array(texts),
        pa.array(texts, pa.large_string()),
        pa.array(texts).dictionary_encode(),
    ):
        file = io.BytesIO()
        pq.write_table(pa.table({"text": column}), file)
        (tmp_path / "a.parquet").write_bytes(file.getvalue())
        assert list(read_texts(tmp_path / "a.parquet")) == texts


def test_the_corpus_is_hostile_for_a_reason(tiny_llama: Path, tmp_path: Path) -> None:
    """The folder that all of the above are copies of is a good one."""
    assert make_home(tiny_llama, tmp_path).is_dir()
