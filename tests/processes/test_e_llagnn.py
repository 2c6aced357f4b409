"""The E-LLaGNN example end to end: a small graph, the real service over the default models, the tables it prints."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lathe_client import EnrichmentStore, RetryPolicy
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv

from examples.e_llagnn.__main__ import main
from tests.conftest import REPOSITORY
from tests.processes.conftest import Service

pytestmark = pytest.mark.processes

NUM_NODES = 30


@pytest.fixture(scope="module")
def cora_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 nodes in Cora's files, two classes, most edges within one."""
    folder = tmp_path_factory.mktemp("graph")
    random = np.random.default_rng(0)
    with gzip.open(folder / "nodes.jsonl.gz", "wt") as file:
        for index in range(NUM_NODES):
            split = ("train", "val", "test")[index // 2 % 3]
            node = {
                "id": index,
                "title": f"node {index}",
                "text": f"a text about {'lathes' if index % 2 else 'looms'}",
                "label": index % 2,
                "label_name": ("Looms", "Lathes")[index % 2],
                "split": split,
                "split_60_20_20": split,
            }
            file.write(json.dumps(node) + "\n")
    with gzip.open(folder / "edges.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["src", "dst"])
        writer.writerows((a, a + 2) for a in range(NUM_NODES - 2))
        writer.writerows(random.choice(NUM_NODES, 2, replace=False).tolist() for _ in range(4))
    return folder


@pytest.mark.real_model
def test_every_study_runs_and_goes_on_where_it_stopped(
    real_service: Service, cora_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--graph", "cora", "--path", str(cora_like), "--url", real_service.url),
        *("--work", str(tmp_path), "--plots", str(tmp_path), "--seeds", "1", "--splits", "public"),
        *("--models", "gcn", "sage", "gat", "--budgets", "0.1", "1.0", "--depths", "2", "4"),
        *("--strategies", "random", "degree", "--prompts", "summary@1", "terms@1"),
        *("--max-tokens", "4", "--scorers", "embed", "--join", "append"),
    ]
    studies = ["budgets", "depth", "joins", "prompts", "llms", "scorers", "modes"]
    main([*arguments, "--studies", *studies])
    printed = capsys.readouterr().out
    for title in ("GCN", "SAGE", "GAT", "Depth", "Joins", "Prompts", "Llms", "Judged", "Modes"):
        assert f"### {title}" in printed
    for name in ("budgets", "depth"):
        assert (tmp_path / f"e_llagnn_cora_{name}.png").read_bytes().startswith(b"\x89PNG")
    [folder] = tmp_path.glob("cora-*")
    rows = json.loads((folder / "rows.json").read_text())
    enriched = [row for row in rows if row["budget"] == 1.0]
    store = EnrichmentStore.at(folder / "smollm2-135m-summary.v1-4-append")
    assert {row["num_enriched"] for row in enriched if row["recipe"]["prompt"] == "summary@1"} == {
        store.num_filled
    }
    assert store.num_filled > 0
    assert all(row["num_enriched"] <= 3 for row in rows if row["recipe"] and row["budget"] == 0.1)

    main([*arguments, "--studies", *studies, "--url", "http://127.0.0.1:9"])
    assert capsys.readouterr().out == printed
    assert json.loads((folder / "rows.json").read_text()) == rows


def test_a_service_that_is_not_there_is_said(
    cora_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetryPolicy, "wait_seconds", lambda *_: None)  # gives up at once
    with pytest.raises(SystemExit, match=r"no service at http://127\.0\.0\.1:9"):
        main(["--graph", "cora", "--path", str(cora_like), "--url", "http://127.0.0.1:9",
              "--work", str(tmp_path)])  # fmt: skip


@pytest.mark.real_model
def test_the_lines_of_the_documentation_run(real_service: Service) -> None:
    page = (REPOSITORY / "docs" / "e_llagnn.md").read_text()
    lines = page.split("```python\n")[1].split("```")[0]
    assert "http://127.0.0.1:8000" in lines
    x = torch.nn.functional.normalize(torch.randn(NUM_NODES, 384), dim=1)
    ring = torch.arange(NUM_NODES)
    data = Data(
        x=x,
        y=ring % 2,
        edge_index=torch.stack([ring, (ring + 2) % NUM_NODES]),
        text=[f"node {i} is about {('looms', 'lathes')[i % 2]}" for i in range(NUM_NODES)],
        train_mask=ring < 20,
    )
    gnn = SAGEConv(384, 2)
    names: dict[str, Any] = {
        "data": data,
        "gnn": gnn,
        "optimizer": torch.optim.Adam(gnn.parameters(), 0.01),
    }
    exec(compile(lines.replace("http://127.0.0.1:8000", real_service.url), "page", "exec"), names)
    assert int(names["mask"].sum()) == 3
    changed = (names["enriched"] != x).any(1)
    assert torch.equal(changed, names["mask"])
    assert not torch.equal(names["with_llm"], names["llm_free"])
