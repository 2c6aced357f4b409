"""The files in docker/ parse, the dashboard reads series that Lathe exports, and every alert is tested and explained.

tests/processes/test_prometheus.py asks a real Prometheus about their expressions.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
DOCKER = REPOSITORY / "docker"


def test_yaml_parses_and_the_image_is_not_root() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {"lathe", "redis", "prometheus", "grafana"}
    for path in DOCKER.rglob("*.y*ml"):
        yaml.safe_load(path.read_text())
    assert (DOCKER / "Dockerfile").read_text().count("USER 10001") == 2


def test_the_dashboard_reads_our_series() -> None:
    source = (REPOSITORY / "service" / "metrics.py").read_text()
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "lathe.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for name in re.findall(r"(?:vllm:|lathe_)\w+", target["expr"]):
                stem = re.sub(r"_(total|bucket)$", "", name).removeprefix("vllm:")
                assert stem in source, name


def test_every_alert_is_tested_both_ways_and_explained() -> None:
    (group,) = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"]
    names = {rule["alert"] for rule in group["rules"]}
    fires: set[str] = set()
    quiet: set[str] = set()
    for case in yaml.safe_load((DOCKER / "alerts.test.yml").read_text())["tests"]:
        for check in case["alert_rule_test"]:
            (fires if check["exp_alerts"] else quiet).add(check["alertname"])
    assert fires == quiet == names
    runbook = (REPOSITORY / "docs" / "operations.md").read_text()
    assert set(re.findall(r"^### (Lathe\w+)$", runbook, re.MULTILINE)) == names


def test_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        done = subprocess.run([promtool, *command], cwd=DOCKER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
