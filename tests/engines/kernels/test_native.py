"""Building and finding the native library; what it says where it cannot be had."""

import threading
from pathlib import Path

import pytest

from engines.kernels import native
from engines.kernels.native import NativeUnavailableError, build, native_library, open_library

SOURCE = 'extern "C" int lathe_answer() { return 42; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one line in place of ours."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(native, "SOURCES", folder)
    return folder


def test_built_once_and_again_when_anything_changes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = build(cache, flags=())
    written = first.stat().st_mtime_ns
    assert build(cache, flags=()) == first
    assert first.stat().st_mtime_ns == written
    other_flags = build(cache, flags=("-DX",))
    (sources / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    other_source = build(cache, flags=())
    monkeypatch.setattr(native, "cpu_features", lambda: frozenset({"avx2"}))
    other_cpu = build(cache, flags=())
    libraries = {first, other_flags, other_source, other_cpu}
    assert len(libraries) == 4
    assert {path for path in cache.iterdir() if path.name != ".lock"} == libraries


def test_those_who_want_it_at_once_wait_for_one_build(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[Path] = []
    compile_really = native._compile

    def count(command: list[str], files: list[Path], library: Path) -> None:
        compilations.append(library)
        compile_really(command, files, library)

    monkeypatch.setattr(native, "_compile", count)
    threads = [
        threading.Thread(target=build, args=(tmp_path / "cache",), kwargs={"flags": ()})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 1
    assert compilations[0].is_file()


def test_a_failing_compiler_is_quoted_and_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    (sources / "answer.cpp").write_text("int broken = oops;\n")
    with pytest.raises(NativeUnavailableError, match="oops"):
        build(tmp_path / "cache", flags=())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_no_compiler(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(NativeUnavailableError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        build(tmp_path / "cache", flags=())


def test_a_folder_that_cannot_be_made(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeUnavailableError, match="cannot build in"):
        build(tmp_path / "file" / "cache", flags=())


def test_a_cpu_without_avx2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_features", lambda: frozenset({"fma", "f16c"}))
    with pytest.raises(NativeUnavailableError, match="the CPU has no avx2"):
        open_library(tmp_path, flags=(), num_threads=1)


def test_without_it_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_features", frozenset)
    native_library.cache_clear()
    assert native_library() == "the CPU has no avx2, f16c, fma"
    native_library.cache_clear()
