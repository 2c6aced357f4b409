"""What the E-LLaGNN example asks the service for, and what it keeps of that on this machine."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from lathe_client import EnrichmentClient, RetryPolicy

import examples.e_llagnn.__main__ as example
from examples.e_llagnn.collect import Source
from examples.e_llagnn.graphs import Split, TextGraph
from tests.client.conftest import serve

REFUSAL = {"error": {"message": "no model 'e'", "code": "model_not_found", "param": "model"}}


def build_graph(*texts: str, labels: tuple[int, ...] = (0, 1, 0)) -> TextGraph:
    one = np.array([0])
    return TextGraph(
        name="letters (of a test)",
        ids=["a", "b", "c"],
        texts=list(texts) or ["one", "two", "three"],
        labels=np.array(labels),
        classes=["x", "y"],
        edges=np.array([[0, 1], [1, 2]]),
        splits={"public": Split(train=one, val=one + 1, test=one + 2)},
    )


class Refusals:
    """A service that answers nothing but errors, of these statuses; then 404."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.num_asked = 0
        self.app = FastAPI()
        self.app.add_api_route("/v1/embeddings", self.embeddings, methods=["POST"])

    async def embeddings(self) -> JSONResponse:
        self.num_asked += 1
        return JSONResponse(REFUSAL, self.statuses.pop(0) if self.statuses else 404)


@pytest.fixture
def refusals() -> Refusals:
    return Refusals(503, 429)


@pytest.fixture
def url(refusals: Refusals) -> Iterator[str]:
    with serve(refusals.app) as url:
        yield url


def test_a_refusal_is_one_line_after_the_retries_that_make_sense(
    url: str,
    refusals: Refusals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def impatient(url: str, graph: TextGraph, folder: Path, api_key: str | None) -> Source:
        source = Source(url, graph, folder, api_key)
        source.client.close()
        source.client = EnrichmentClient(url, api_key, retry=RetryPolicy(first_seconds=0))
        return source

    monkeypatch.setattr(example, "Source", impatient)
    monkeypatch.setattr(example, "load_debian", lambda _: build_graph())
    with pytest.raises(SystemExit) as ended:
        example.main(["--url", url, "--work", str(tmp_path)])
    assert ended.value.code == "error: no model 'e' (parameter model) [404 model_not_found]"
    assert refusals.num_asked == 3
