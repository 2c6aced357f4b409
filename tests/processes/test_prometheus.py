"""Dashboard and alerts against a Prometheus that scrapes a running service: every expression finds its series."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from compression.checkpoint import add_skip_profile
from compression.ffn_skip.profile import SkipPoint, SkipProfile, Substitute
from compression.import_model import import_folder
from compression.registry import ModelRegistry
from tests.conftest import REPOSITORY
from tests.processes.conftest import DEADLINE_SECONDS, Service, eventually

DOCKER = REPOSITORY / "docker"
BOARD = json.loads((DOCKER / "grafana" / "dashboards" / "lathe.json").read_text())
RULES = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
MODEL, ENCODER = "smollm2-135m", "all-minilm-l6-v2"
NUM_SCRAPES = 4


def expressions() -> list[tuple[str, str]]:
    """(panel, expression) with Grafana's variables as it would fill them in."""
    filled = {"$__rate_interval": "5s", "$model": ".*"}
    found = []
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in filled.items():
                expression = expression.replace(name, value)
            found.append((panel["title"], expression))
    return found


class Prometheus:
    """A real one, scraping `target` every second."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
        (job,) = config["scrape_configs"]
        job |= {"scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
        shutil.copy(DOCKER / "alerts.yml", folder)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )

    def get(self, path: str, **parameters: str) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{path}", params=parameters)
        answer = response.json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        result = self.get("query", query=expression)["result"]
        return [float(series["value"][1]) for series in result]

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/-/ready").status_code == 200
        return False

    def num_scrapes(self) -> float:
        return sum(self.values('count_over_time(up{job="lathe"}[10m])'))


def give_skip_profile(home: Path, model_id: str) -> None:
    """So that requests may skip: the profile of a model whose every feed-forward qualifies."""
    folder = home / "models" / model_id
    plain = folder.rename(home / "plain")
    profile = SkipProfile(
        num_layers=2,
        hidden_size=64,
        cold_start=0,
        cold_end=0,
        k=1,
        warm_up=0,
        points=(SkipPoint(target_ratio=0.5, tau=-1.0, skip_ratio=0.5),),
        substitutes=(Substitute(), Substitute()),
        dtype="F32",
    )
    add_skip_profile(plain, folder, profile, {})


@pytest.fixture(scope="module")
def service(
    tiny_llama: Path, native_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    home = tmp_path_factory.mktemp("watched")
    shutil.copytree(native_folder, home / "native")
    source = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("source") / "long")
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = 2048  # a prompt of the catalog is a token per letter here
    (source / "config.json").write_text(json.dumps(config))
    for model_id in (MODEL, ENCODER):
        import_folder(ModelRegistry(home / "models"), model_id, source, report=lambda _: None)
    give_skip_profile(home, MODEL)
    running = Service(home, (MODEL, ENCODER))
    running.start()
    yield running
    assert running.stop() == 0


def use(service: Service, number: int) -> None:
    """One of each thing that the dashboard shows."""
    with httpx.Client(base_url=f"{service.url}/v1", timeout=60) as client:
        body = {"model": MODEL, "prompt": "a" * 40, "max_tokens": 24, "ignore_eos": True}
        for extra in ({}, {"skip": "profile"}):
            answer = client.post("/completions", json=body | extra)
            assert answer.status_code == 200, answer.text
        left = body | {"stream": True, "max_tokens": 80}
        with client.stream("POST", "/completions", json=left) as stream:
            next(stream.iter_lines())  # and leaves
        nodes = [{"id": letter, "text": letter * 3} for letter in "abcdef"]
        enrich = {"model": MODEL, "prompt": "repair@1", "nodes": nodes, "return": ["text"]}
        enriched = client.post("/enrich", json=enrich)
        assert enriched.status_code == 200, enriched.text
        assert {row["status"] for row in enriched.json()["data"]} <= {"ok", "cached"}
        if number == 0:
            job = {"type": "export", "model": MODEL, "format": "dense"}
            assert client.post("/jobs", json=job).status_code == 201


@pytest.fixture(scope="module")
def prometheus(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has seen some seconds of use."""
    watching = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{service.port}")
    try:
        eventually(watching.is_ready, "a Prometheus that answers")
        deadline = time.monotonic() + DEADLINE_SECONDS
        number = 0
        while watching.num_scrapes() < NUM_SCRAPES:
            assert time.monotonic() < deadline
            use(service, number)
            number += 1
        yield watching
    finally:
        watching.process.terminate()
        watching.process.wait(DEADLINE_SECONDS)


def test_every_panel_shows_something(service: Service, prometheus: Prometheus) -> None:
    """Asked while the service is used, since a rate of nothing is no number."""
    missing = dict.fromkeys(expressions())
    deadline = time.monotonic() + DEADLINE_SECONDS
    number = 1000
    while missing and time.monotonic() < deadline:
        use(service, number)
        number += 1
        for panel, expression in list(missing):
            if any(value == value for value in prometheus.values(expression)):  # not only NaN
                del missing[panel, expression]
    assert list(missing) == []


def test_the_model_variable_lists_the_models(prometheus: Prometheus) -> None:
    (variable,) = (v for v in BOARD["templating"]["list"] if v["name"] == "model")
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
    listed = {series["metric"][label] for series in prometheus.get("query", query=metric)["result"]}
    assert listed == {MODEL, ENCODER}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_reads_series_that_exist(prometheus: Prometheus, rule: Any) -> None:
    """`promtool test rules` says when it fires; here, that nothing in it is misspelled."""
    prometheus.get("query", query=rule["expr"])
    names = set(re.findall(r"\b(?:vllm:|lathe_|http_|process_)\w+|\bup\b", rule["expr"]))
    assert names
    for name in names:
        assert prometheus.values(f"count({name})"), name


def test_a_healthy_service_raises_no_alert(prometheus: Prometheus) -> None:
    groups = eventually(
        lambda: [
            group
            for group in prometheus.get("rules")["groups"]
            if not group["lastEvaluation"].startswith("0001")
        ],
        "an evaluation of the rules",
    )
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in RULES}
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule.get("lastError")] == []
    assert [rule["name"] for rule in rules if rule["state"] != "inactive"] == []
