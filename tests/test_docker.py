"""The files in docker/ parse, and the dashboard reads only series that Lathe exports."""

import json
import re
from pathlib import Path

import yaml

DOCKER = Path(__file__).parent.parent / "docker"


def test_yaml_parses_and_the_image_is_not_root() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {"lathe", "redis", "prometheus", "grafana"}
    for path in DOCKER.rglob("*.y*ml"):
        yaml.safe_load(path.read_text())
    assert (DOCKER / "Dockerfile").read_text().count("USER 10001") == 2


def test_the_dashboard_reads_our_series() -> None:
    source = (Path(__file__).parent.parent / "service" / "metrics.py").read_text()
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "lathe.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name in re.findall(r"(?:vllm:|lathe_)\w+", target["expr"]):
                stem = re.sub(r"_(total|bucket)$", "", name).removeprefix("vllm:")
                assert stem in source, name
