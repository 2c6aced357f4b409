"""Debian's package graph: parsing by hand, and a committed sample that the store takes."""

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from graph import debian
from graph.debian import (
    AptListsError,
    assemble,
    build_graph,
    load_graph,
    load_sample,
    parse_stanzas,
)
from graph.store import GraphColumns, GraphStore

PACKAGES = """\
Package: viewer
Section: graphics
Depends: libc6 (>= 2.36), codec:any (>= 1) | codec-ng, viewer
Recommends: shell
Description: shows pictures
Description-md5: aa
Tag: role::program, interface::TODO,
 use::viewing

Package: libc6
Section: libs
Depends: viewer
Description: C library


Package: codec
Section: video
Description: old words
Description-md5: bb

Package: codec
Section: video
Description: new words
Description-md5: cc

Package: shell
Section: utils
Description: a shell

Package: alone
Section: utils
Depends: libc6
Description: nobody needs it
"""
TRANSLATIONS = """\
Package: viewer
Description-md5: aa
Description-en: shows pictures
 It shows them
 quickly.
 .
  * and well

Package: codec
Description-md5: bb
Description-en: old words
 Out of date.
"""


def assembled(translations: str = TRANSLATIONS, num_nodes: int | None = None) -> dict[str, Any]:
    return assemble(parse_stanzas(PACKAGES), parse_stanzas(translations), num_nodes)


def test_nodes_and_edges_by_hand() -> None:
    body = assembled()
    assert [(node["id"], node["label"]) for node in body["nodes"]] == [
        ("codec", "video"),
        ("shell", "utils"),
        ("viewer", "graphics"),
    ]
    assert body["edges"] == [["viewer", "codec"], ["viewer", "shell"]]
    assert body["directed"] is True


def test_texts_by_hand() -> None:
    texts = {node["id"]: node["text"] for node in assembled()["nodes"]}
    assert texts["viewer"] == "viewer: shows pictures\n\nIt shows them\nquickly.\n\n * and well"
    assert texts["codec"] == "codec: new words"  # the later version, whose translation is not there
    assert texts["shell"] == "shell: a shell"


def test_without_translations_the_tags_are_text() -> None:
    texts = {node["id"]: node["text"] for node in assembled("")["nodes"]}
    assert texts["viewer"] == "viewer: shows pictures\n\nTags: role program, use viewing"


def test_connected_part() -> None:
    body = assembled(num_nodes=2)
    assert len(body["nodes"]) == 2
    assert len(body["edges"]) == 1
    assert body == assembled(num_nodes=2)


def test_sample_is_a_connected_graph(tmp_path: Path) -> None:
    body = load_sample()
    parts = GraphColumns(
        ids=pa.array([node["id"] for node in body["nodes"]]),
        texts=pa.array([node["text"] for node in body["nodes"]]),
        labels=pa.array([node["label"] for node in body["nodes"]]),
        sources=pa.array([source for source, _ in body["edges"]]),
        targets=pa.array([target for _, target in body["edges"]]),
    )
    store = GraphStore(tmp_path)
    info, _ = store.create(
        "graph-1", parts, name=body["name"], owner="t", request_hash="", directed=True
    )
    assert (info.num_nodes, info.num_self_loops, info.num_duplicate_edges) == (500, 0, 0)
    graph = store.get("graph-1", "t")
    reached, frontier = {0}, [0]
    while frontier:
        new = {int(other) for other in graph.neighbors(frontier.pop())} - reached
        reached |= new
        frontier += new
    assert len(reached) == 500
    assert len({node["label"] for node in body["nodes"]}) > 15


def test_fallback_without_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(AptListsError, match="not installed"):
        build_graph()
    body, source = load_graph()
    assert body == load_sample()
    assert source == "committed sample (apt is not installed)"


def test_apt_that_fails_or_has_no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(debian, "_APT_HELPER", "/")

    def fails(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("apt-get", 1)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(AptListsError, match="TimeoutExpired"):
        build_graph()
    monkeypatch.setattr(debian, "_run", lambda _: "")
    with pytest.raises(AptListsError, match="no package lists"):
        build_graph()


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {"Packages": PACKAGES, "Translations": TRANSLATIONS}
    monkeypatch.setattr(debian, "_read_lists", lambda kind: lists[kind])
    debian.main(["--out", str(tmp_path / "g.json.gz")])
    assert json.loads(gzip.decompress((tmp_path / "g.json.gz").read_bytes())) == assembled()
    assert "3 packages, 2 dependencies, 3 sections" in capsys.readouterr().out
    debian.main(["--out", str(tmp_path / "g.json"), "--nodes", "2"])
    assert len(json.loads((tmp_path / "g.json").read_text())["nodes"]) == 2
