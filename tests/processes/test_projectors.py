"""A graph uploaded to a running service, a projector trained by its worker, and the projector's answers about it."""

from typing import Any

import httpx

from tests.processes.conftest import TINY, Service, eventually

NUM_NODES = 40


def test_upload_train_and_ask(tiny_service: Service) -> None:
    with httpx.Client(base_url=f"{tiny_service.url}/v1", timeout=60) as client:
        nodes = [
            {
                "id": f"n{index}", "text": "", "label": "yz"[index % 2],
                "features": [3.0 * (index % 2) - 1.5, 0.1 * (index % 7), 1.0],
                "split": "test" if index >= 30 else "train",
            }
            for index in range(NUM_NODES)
        ]  # fmt: skip
        edges = [[f"n{index}", f"n{(index + 2) % NUM_NODES}"] for index in range(NUM_NODES)]
        graph = {"name": "ring", "nodes": nodes, "edges": edges}
        graph_id = client.post("/graphs", json=graph).json()["id"]
        body = {
            "type": "train_projector",
            "graph": graph_id,
            "model": TINY,
            "output": "ring",
            "template": {"kind": "ho", "hops": 2, "operator": "mean"},
            "settings": {"epochs": 4, "batch_size": 10, "learning_rate": 0.05, "dtype": "float32"},
        }
        created = client.post("/jobs", json=body)
        assert created.status_code == 201, created.text
        job_id = created.json()["id"]

        def ended() -> Any:
            job = client.get(f"/jobs/{job_id}").json()
            return job if job["status"] in ("succeeded", "failed") else None

        eventually(lambda: ended() is not None, "the job's end")
        job = ended()
        assert job["status"] == "succeeded", (job["error"], tiny_service.log)
        assert job["progress"] == {"step": 12, "total": 12}
        found = job["result"]["report"]["results"]["node_classification"]
        assert found["val"] is None  # the graph has no such split
        assert [one["id"] for one in client.get("/projectors").json()["data"]] == ["ring"]
        assert client.get(f"/jobs/{job_id}/artifacts/report.md").text.startswith("# ")

        asked = [node["id"] for node in nodes if node["split"] == "test"]
        query = {"projector": "ring", "task": "node_classification", "node_ids": asked}
        response = client.post(f"/graphs/{graph_id}/query", json=query)
        assert response.status_code == 200, response.text
        answers = response.json()["data"]
        assert answers[0]["template_nodes"] == [["n26", "n28", "n30", "n32", "n34"]]
        for answer in answers:
            assert set(answer["probabilities"]) == {"y", "z"}
            assert abs(sum(answer["probabilities"].values()) - 1) < 1e-6
            # random weights say "y" and "z" alike: what is right is in the job's own tests
            assert abs(answer["logprobs"]["y"] - answer["logprobs"]["z"]) < 1
        assert found["test"]["most_frequent"] == 0.5
        assert client.delete("/projectors/ring").status_code == 200
        gone = client.post(f"/graphs/{graph_id}/query", json=query)
        assert gone.json()["error"]["code"] == "projector_not_found"
