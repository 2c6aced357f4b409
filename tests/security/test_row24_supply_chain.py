"""Row 24: an audit says what it did not look up, a known vulnerability fails it, and a release lists what is in it."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import REPOSITORY


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


CLEAN = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {
    "name": "b",
    "skip_reason": "Dependency not found on PyPI and could not be audited: b (1)",
}
BAD = {
    "name": "c", "version": "1",
    "vulns": [{"id": "CVE-2026-1", "fix_versions": ["2"], "aliases": [], "description": ""},
              {"id": "CVE-2026-2", "fix_versions": [], "aliases": [], "description": ""}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (report(CLEAN), 0, ["audited 1 packages: 0 known vulnerabilities"]),
        (
            report(CLEAN, SKIPPED), 0,
            ["audited 1 packages: 0 known vulnerabilities", "NOT AUDITED, 1 packages: b"],
        ),
        (report(SKIPPED, SKIPPED), 0, ["NOT AUDITED: the advisory database knows none of 2 packages here"]),
        ("", 0, ["NOT AUDITED: the advisory database could not be reached"]),
        ("error", 0, ["NOT AUDITED: the advisory database could not be reached"]),
        (
            report(CLEAN, BAD), 1,
            ["c 1: CVE-2026-1, fixed in 2", "c 1: CVE-2026-2, fixed in no version yet",
             "audited 2 packages: 2 known vulnerabilities"],
        ),
    ],
)  # fmt: skip
def test_the_audits_verdict(text: str, status: int, said: list[str]) -> None:
    assert load("audit").verdict(text) == (status, said)


def test_a_bill_of_materials_has_no_path_of_this_machine() -> None:
    local = {"type": "distribution", "url": "file:///home/x/lathe"}
    public = {"type": "website", "url": "https://example.org"}
    document = {
        "metadata": {"component": {"name": "lathe", "externalReferences": [local]}},
        "components": [{"name": "a", "externalReferences": [local, public]}, {"name": "b"}],
    }
    assert load("sbom").without_local_references(document) == {
        "metadata": {"component": {"name": "lathe"}},
        "components": [{"name": "a", "externalReferences": [public]}, {"name": "b"}],
    }


LEAST = {
    "torch": "2.10",  # CVE-2026-24747
    "transformers": "5.3.0",  # CVE-2026-4372
    "starlette": "1.0.1",  # CVE-2026-48710
    "jinja2": "3.1.6",
}


@pytest.mark.parametrize("name", LEAST)
def test_no_release_with_a_known_hole_may_be_installed(name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    requirements = {r.name: r for r in map(Requirement, project["dependencies"])}
    lowest = [Version(s.version) for s in requirements[name].specifier if s.operator == ">="]
    assert lowest
    assert max(lowest) >= Version(LEAST[name])


def test_ci_audits_and_every_version_is_pinned() -> None:
    assert re.search(r"^  make audit$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    constraints = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = [line for line in constraints if line.strip() and not line.startswith("#")]
    assert len(pinned) > 50
    assert [
        line for line in pinned if not re.fullmatch(r"[\w.\[\]-]+==[\w.+!]+(?: ;.*)?", line)
    ] == []


def test_the_threat_list_names_tests_that_exist() -> None:
    """docs/security.md points at files, and at functions of them."""
    document = (REPOSITORY / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", document))
    assert len(named) > 25
    for file, function in named:
        path = REPOSITORY / file
        assert path.is_file(), file
        assert not function or f"def {function}(" in path.read_text(), f"{file}::{function}"
    rows = {path.name for path in Path(__file__).parent.glob("test_row*.py")}
    assert rows == {Path(file).name for file, _ in named if "/security/" in file}
