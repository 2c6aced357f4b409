"""The programs of the client's README, as they are written there."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lathe_client
import numpy as np
import pytest
from lathe_client import EnrichmentClient, EnrichmentStore, Job, calls

from tests.client.conftest import serve
from tests.jobs.conftest import REPOSITORY
from tests.service.test_graph_routes import Service

DIM = 384


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "client/README.md").read_text(), re.S)


def test_the_programs_run_one_after_the_other(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.encoder.info = replace(service.encoder.info, hidden_size=DIM)
    service.writer._answer = lambda prompt: '{"summary": "What it says."}'
    options: Any = calls._options
    models: Any = {"model": "writer", "embedding_model": "encoder"}
    monkeypatch.setattr(calls, "_options", lambda given: options({**given, **models}))

    class ScriptedClient(EnrichmentClient):
        """Of scripted models, with no worker for jobs."""

        def __init__(self, _: str) -> None:
            super().__init__(url)

        def embeddings(self, texts: Any, **_: Any) -> Any:
            return np.zeros((len(texts), DIM), dtype=np.float32)

        def submit_job(self, *, graph_id: Any, select: Any, node_ids: Any, **given: Any) -> Job:  # type: ignore[override]
            assert node_ids is None
            chosen = self.select(graph_id, **select).node_ids
            self.rows = self.enrich_graph(graph_id, chosen, **given)
            fields: Any = {"type": "enrich", "step": 0, "total": 0, "result": None, "error": None}
            return Job(id="job", status="succeeded", **fields)

        def wait(self, job_id: str, **_: Any) -> Any:
            return None

        def job_result(self, job_id: str) -> Any:
            return self.rows

    monkeypatch.setattr(lathe_client, "EnrichmentClient", ScriptedClient)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with serve(service.app, lifespan="off") as url:
        first, second, third = blocks()
        exec(first, names)
        assert names["enriched"].embeddings.shape == (2, DIM)
        exec(second, names)
        assert int(names["data"].enriched_mask.sum()) == 2
        exec(third, names)
    assert names["batch"].x_enriched.shape == (4, DIM)
    assert EnrichmentStore.at(tmp_path / "vectors").num_nodes == 4
