"""Row 1: no socket, queue, cache or file of ours is ever unpickled or run.

Pickles put into Redis are refused by name in tests/jobs/test_redis.py, and bytes that are no message in
tests/engines/test_wire.py and test_cache.py; here is the gate that keeps the means out of the code.
"""

import ast
import pickle
from pathlib import Path

import pytest

from engines import wire
from tests.conftest import REPOSITORY

ROOMS = ("service", "jobs", "engines", "compression", "graph", "training", "evaluation", "client")
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "code",
           "codeop", "jsonpickle"}  # fmt: skip
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("yaml", "load_all"), ("os", "system"), ("os", "popen"), ("pd", "read_pickle"), ("np", "fromfile"),
}  # fmt: skip


def findings(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            found += _call(node)
    return found


def _call(node: ast.Call) -> list[str]:
    found = []
    function = node.func
    if isinstance(function, ast.Name) and function.id in NAMES:
        found.append(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        pair = (function.value.id, function.attr)
        if pair in ATTRIBUTES:
            found.append(".".join(pair))
    for keyword in node.keywords:
        is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and (
            is_true or not isinstance(keyword.value, ast.Constant)
        ):
            found.append(f"{keyword.arg}=True")
        if keyword.arg == "weights_only" and not is_true:
            found.append("weights_only=False")
    return found


def test_the_code_has_no_means_to_run_data() -> None:
    files = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    assert len(files) > 100
    wrong = {
        str(path.relative_to(REPOSITORY)): found
        for path in files
        if (found := findings(path.read_text()))
    }
    assert wrong == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch; torch.load('x')", "yaml.load(x)",
        "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)", "eval('1')",
        "A.from_pretrained(x, trust_remote_code=True)", "torch.x(f, weights_only=False)",
        "subprocess.run('x', shell=True)", "import joblib.numpy_pickle",
    ],
)  # fmt: skip
def test_the_gate_finds_what_it_looks_for(source: str) -> None:
    assert findings(source)


def test_everything_that_transformers_loads_is_told_not_to_run_code() -> None:
    """The argument is there, not left to a default."""
    for room in ROOMS:
        for path in (REPOSITORY / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = node.func.value
                    auto = isinstance(owner, ast.Name) and (
                        owner.id.startswith("Auto") or owner.id == "auto_class"
                    )
                    if auto and node.func.attr in ("from_pretrained", "from_config"):
                        names = {keyword.arg for keyword in node.keywords}
                        assert "trust_remote_code" in names, f"{path}:{node.lineno}"


class Canary:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


def test_the_canary_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "ran"))).close()  # noqa: S301
    assert (tmp_path / "ran").exists()


def test_a_pickle_on_the_engines_socket_is_refused(tmp_path: Path) -> None:
    bomb = pickle.dumps(Canary(tmp_path / "ran"))
    for decode in (wire.decode_client, wire.decode_host):
        with pytest.raises(wire.WireError):
            decode(bomb)
    assert not (tmp_path / "ran").exists()
