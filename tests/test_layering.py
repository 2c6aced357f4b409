"""Rooms import downwards only, package files are empty, and the API process loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "compression": set[str](),
    "engines": {"compression"},
    "evaluation": {"engines", "compression"},
    "graph": {"engines", "compression"},
    "training": {"engines", "compression"},
    "jobs": {"graph", "training", "evaluation", "engines", "compression"},
    "service": {"jobs", "graph", "training", "evaluation", "engines", "compression"},
}
CLIENT = ROOT / "client" / "lathe_client"


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names & ALLOWED.keys()


def test_rooms_import_downwards_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for room, allowed in ALLOWED.items()
        for path in sorted((ROOT / room).rglob("*.py"))
        for other in sorted(imported_rooms(path) - allowed - {room})
    ]
    assert wrong == []


def test_rooms_and_client_do_not_know_each_other() -> None:
    files = sorted(CLIENT.rglob("*.py"))
    assert files
    assert [(path.name, imported_rooms(path)) for path in files if imported_rooms(path)] == []
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert "lathe_client" not in path.read_text(), path


def test_the_client_needs_no_torch_but_for_its_pyg_parts() -> None:
    code = (
        "import sys\n"
        "import lathe_client, lathe_client.prefetch\n"
        "loaded = [m for m in ('torch', 'torch_geometric', 'pydantic') if m in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_package_files_are_empty() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("__init__.py"):
            assert path.read_text() == "", path


def test_the_api_process_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from service.app import build_app\n"
        "from service.settings import Settings\n"
        f"build_app(Settings(home=pathlib.Path({str(tmp_path)!r}))).openapi()\n"
        "loaded = [m for m in ('torch', 'transformers', 'scipy', 'pyarrow') if m in sys.modules]\n"
        "assert not {'torch', 'transformers'} & set(loaded), loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
