"""`lathe import-projector`: from files to a projector that the registry lists, and mistakes as one line."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file
from torch import nn

from compression.checkpoint import checkpoint_hash
from compression.import_model import import_folder
from compression.registry import ModelRegistry
from graph.llaga.projector import ProjectorRegistry
from graph.llaga.templates import laplacian_embedding
from service.cli import main


@pytest.fixture(scope="module")
def home(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    import_folder(ModelRegistry(home / "models"), "tiny", tiny_llama, report=lambda _: None)
    layer = nn.Linear(3 + 7, 64).state_dict()
    save_file(
        {f"model.mm_projector.{name}": tensor.numpy() for name, tensor in layer.items()},
        home / "mm_projector.safetensors",
    )
    save_file({"u": laplacian_embedding(2, 2)}, home / "laplacian.safetensors")
    return home


def run(home: Path, **changes: Any) -> Result:
    options = {
        "id": "theirs", "model": "tiny", "template": "nd", "hops": 2, "fanout": 2,
        "laplacian": home / "laplacian.safetensors", "task": "link_prediction", "home": home,
    }  # fmt: skip
    words = [
        word
        for name, value in (options | changes).items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]
    return CliRunner().invoke(
        main, ["import-projector", str(home / "mm_projector.safetensors"), *words]
    )


def test_import(home: Path) -> None:
    result = run(home)
    assert result.exit_code == 0, result.output
    assert result.output == "imported theirs: 1 layers from 3 to 64\n"
    ((name, manifest),) = ProjectorRegistry(home / "projectors").list_projectors("local")
    assert (name, manifest.tasks, manifest.encoder) == ("theirs", ("link_prediction",), None)
    model = ModelRegistry(home / "models").get("tiny")
    assert manifest.model_hash == checkpoint_hash(model.manifest)
    again = run(home)
    assert (again.exit_code, again.output) == (1, "Error: a projector 'theirs' exists already\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nobody"}, "there is no model nobody"),
        ({"fanout": 3}, "must be (13, 13), got (7, 7)"),
        ({"laplacian": None}, "goes with the nd template"),
        ({"operator": "mean"}, "operator is for the ho template only"),
        ({"task": "node_classification"}, "needs the classes"),
        ({"task": "poetry"}, "unknown tasks: poetry"),
        ({"id": "../x"}, "projector id must match"),
    ],
)
def test_mistakes_are_one_line(home: Path, changes: dict[str, Any], message: str) -> None:
    result = run(home, **({"id": "other"} | changes))
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (home / "projectors" / "other").exists()
