"""Debian's package graph, from the package lists that apt keeps on any Debian machine.

    python -m graph.debian --out graph.json.gz [--nodes 500]

A node is a package of an application section, with its description as text and the section as label; an edge is a
dependency (`Depends`, `Pre-Depends`, `Recommends`) between two of them. Packages without such an edge are left out.
Libraries, documentation, fonts and the packages of one programming language are not applications: their sections
follow from their names, and they would be two thirds of the nodes. Where apt keeps no translations, and so no long
descriptions, the one-line description and the package's tags are the text.

The result is a body for `POST /v1/graphs`. This reads the local machine: examples and the demo use it, no request
reaches it. Descriptions are part of Debian's free packages (`data/README.md`).
"""

import argparse
import gzip
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

SECTIONS = (
    "admin", "comm", "database", "editors", "electronics", "games", "gnome", "graphics", "hamradio",
    "httpd", "interpreters", "kde", "mail", "math", "net", "otherosfs", "science", "sound", "tex",
    "text", "utils", "vcs", "video", "web", "x11", "xfce",
)  # fmt: skip
_RELATIONS = ("Pre-Depends", "Depends", "Recommends")
_APT_HELPER = "/usr/lib/apt/apt-helper"
_TIMEOUT_SECONDS = 120
_HUB_DEGREE = 35

GraphBody = dict[str, Any]
Stanza = dict[str, str]


class AptListsError(Exception):
    """This machine has no apt, or apt no package lists."""


def load_graph(num_nodes: int | None = None) -> tuple[GraphBody, str]:
    """The graph of this machine's lists, or the committed sample where there are none; and which of them it is."""
    try:
        return build_graph(num_nodes), "apt lists"
    except AptListsError as error:
        return load_sample(), f"committed sample ({error})"


def load_sample() -> GraphBody:
    """500 connected packages of Debian 12."""
    packed = (resources.files("graph") / "data" / "debian_sample.json.gz").read_bytes()
    body: GraphBody = json.loads(gzip.decompress(packed))
    return body


def build_graph(num_nodes: int | None = None) -> GraphBody:
    """The graph of this machine's package lists.

    Args:
        num_nodes: at most so many, a connected part; None is every package.

    Raises:
        AptListsError
    """
    packages = parse_stanzas(_read_lists("Packages"))
    descriptions = parse_stanzas(_read_lists("Translations"))
    return assemble(packages, descriptions, num_nodes)


def _read_lists(kind: str) -> str:
    """All lists of one kind, decompressed by apt; "" where apt keeps none."""
    if shutil.which("apt-get") is None or not Path(_APT_HELPER).exists():
        raise AptListsError("apt is not installed")
    files = _run(
        ["apt-get", "indextargets", "--format", "$(FILENAME)", f"Created-By: {kind}"]
    ).split()
    if not files:
        if kind == "Packages":
            raise AptListsError("apt has no package lists; apt-get update fetches them")
        return ""
    return _run([_APT_HELPER, "cat-file", *files])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=_TIMEOUT_SECONDS, encoding="utf-8"
        )
    except (subprocess.SubprocessError, OSError, UnicodeDecodeError) as error:
        raise AptListsError(f"{command[0]} failed: {type(error).__name__}") from error
    return done.stdout


def parse_stanzas(text: str) -> Iterator[Stanza]:
    """Fields of each stanza of a control file; continuation lines keep their line breaks."""
    for block in re.split(r"\n\n+", text):
        stanza: Stanza = {}
        name = ""
        for line in block.split("\n"):
            if line[:1] in (" ", "\t"):
                stanza[name] = f"{stanza.get(name, '')}\n{line[1:]}"
            elif ":" in line:
                name, _, value = line.partition(":")
                stanza[name] = value.strip()
        if "Package" in stanza:
            yield stanza


def assemble(
    packages: Iterator[Stanza], descriptions: Iterator[Stanza], num_nodes: int | None
) -> GraphBody:
    """The graph of parsed lists; of two versions of a package the later one counts."""
    stanzas = {s["Package"]: s for s in packages if s.get("Section") in SECTIONS}
    long = {
        (s["Package"], s.get("Description-md5")): s["Description-en"]
        for s in descriptions
        if "Description-en" in s
    }
    edges = sorted(
        {
            (name, other)
            for name, stanza in stanzas.items()
            for other in _dependencies(stanza)
            if other in stanzas and other != name
        }
    )
    kept = {name for edge in edges for name in edge}
    if num_nodes is not None and num_nodes < len(kept):
        kept = _connected_part(edges, num_nodes)
    nodes = [
        {
            "id": name,
            "text": _text(stanzas[name], long.get((name, stanzas[name].get("Description-md5")))),
            "label": stanzas[name]["Section"],
        }
        for name in sorted(kept)
    ]
    return {
        "name": "debian packages",
        "directed": True,
        "nodes": nodes,
        "edges": [list(edge) for edge in edges if kept.issuperset(edge)],
    }


def _dependencies(stanza: Stanza) -> set[str]:
    """Names in the relations of a package, alternatives included, versions and architectures dropped."""
    relations = ",".join(stanza[field] for field in _RELATIONS if field in stanza)
    return {name for name in re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]*)", relations)}


def _text(stanza: Stanza, long: str | None) -> str:
    synopsis, _, rest = (long or stanza.get("Description", "")).partition("\n")
    text = f"{stanza['Package']}: {synopsis}"
    paragraphs = "\n".join("" if line == "." else line for line in rest.split("\n"))
    if paragraphs.strip():
        return f"{text}\n\n{paragraphs.strip()}"
    tags = [tag.strip().replace("::", " ") for tag in stanza.get("Tag", "").split(",")]
    tags = [tag.replace("-", " ") for tag in tags if tag and "TODO" not in tag]
    return f"{text}\n\nTags: {', '.join(tags)}" if tags else text


def _connected_part(edges: Sequence[tuple[str, str]], num_nodes: int) -> set[str]:
    """Grow a connected set by random edges (seeded) from a central package; the same every time.

    Hubs that half of everything depends on (adduser, debconf) are left out: they say nothing of a package, and the
    part would be a star.
    """
    neighbors: dict[str, list[str]] = {}
    for source, target in edges:
        neighbors.setdefault(source, []).append(target)
        neighbors.setdefault(target, []).append(source)
    candidates = [name for name in neighbors if len(neighbors[name]) <= _HUB_DEGREE]
    candidates = candidates or list(neighbors)
    usable = set(candidates)
    draw = random.Random(0)
    frontier = [min(candidates, key=lambda name: (-len(neighbors[name]), name))]
    kept: set[str] = set()
    while frontier and len(kept) < num_nodes:
        place = draw.randrange(len(frontier))
        frontier[place], frontier[-1] = frontier[-1], frontier[place]
        name = frontier.pop()
        if name not in kept:
            kept.add(name)
            frontier += [other for other in neighbors[name] if other in usable]
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m graph.debian",
        description="Write Debian's package graph as a body for POST /v1/graphs.",
        epilog="example: python -m graph.debian --out debian.json.gz --nodes 500",
    )
    parser.add_argument("--out", type=Path, required=True, help="a .json or .json.gz file")
    parser.add_argument("--nodes", type=int, help="a connected part of so many packages")
    arguments = parser.parse_args(argv)
    try:
        body = build_graph(arguments.nodes)
    except AptListsError as error:
        raise SystemExit(f"error: {error}") from None
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    if arguments.out.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    arguments.out.write_bytes(data)
    sections = {node["label"] for node in body["nodes"]}
    print(
        f"{arguments.out}: {len(body['nodes'])} packages, {len(body['edges'])} dependencies, "
        f"{len(sections)} sections, {len(data)} bytes"
    )


if __name__ == "__main__":
    main()
