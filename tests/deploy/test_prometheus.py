"""Scraping, alerts and dashboards of the deployment, on a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import onnx_models
import pytest
from deploy_servers import DEPLOY, PrometheusServer, program
from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.infrastructure.telemetry.catalogue import CATALOGUE
from phoenix_ml.infrastructure.telemetry.metrics import Histogram

DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "phoenix.json").read_text())
RULES = (DEPLOY / "prometheus" / "rules.yml").read_text()
RULE_TESTS = (DEPLOY / "prometheus" / "rules_test.yml").read_text()
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
# What has no series until something goes wrong.
MAY_BE_EMPTY = {"Process restarts A"}
# Rules are evaluated every 15 s.
DEADLINE_S = 30


def _exposed_names() -> set[str]:
    names = set()
    for metric in CATALOGUE:
        suffixes = ["_bucket", "_sum", "_count"] if isinstance(metric, Histogram) else [""]
        names |= {f"{metric.name}{suffix}" for suffix in suffixes}
    return names


@pytest.mark.parametrize(
    "text", [RULES, RULE_TESTS, *QUERIES.values()], ids=["rules", "rule tests", *QUERIES]
)
def test_every_metric_is_one_of_ours(text: str) -> None:
    """An alert on a metric that was renamed is silent for ever, and nobody notices."""
    named = set(re.findall(r"\bphoenix_\w+", text))

    assert named - _exposed_names() == set()


def test_the_configuration_is_valid() -> None:
    """Prometheus's own tool accepts the configuration, the targets and the rules."""
    checked = _promtool("check", "config", "prometheus.yml")

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_for_what_it_is_there_for() -> None:
    """The unit tests of the rules, run by Prometheus's own tool."""
    tested = _promtool("test", "rules", "rules_test.yml")

    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_is_quiet() -> None:
    """No alert is added without both."""
    alerts = re.findall(r"- alert: (\w+)", RULES)

    # An alert that is expected stands in a block with `exp_alerts`, one that is not on a line that ends there.
    fires = set(re.findall(r"alertname: (\w+),?\s+exp_alerts:", RULE_TESTS))
    is_quiet = set(re.findall(r"alertname: (\w+)\}", RULE_TESTS))
    assert len(alerts) >= 13
    assert set(alerts) == fires == is_quiet


def _promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool", "prometheus"), *arguments],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """A server with a model and features of one entity."""
    server = PhoenixServer(tmp_path_factory.mktemp("watched"))
    model = onnx_models.write(server.folder / "linear.onnx", onnx_models.linear_regressor())
    names = server.register(model, "linear", "1.0.0").metadata.features
    with server:
        features = dict.fromkeys(names, 1.0)
        httpx.put(f"{server.url}/features/e1", json={"features": features}).raise_for_status()
        yield server


@pytest.fixture(scope="module")
def prometheus(phoenix: PhoenixServer) -> Iterator[PrometheusServer]:
    """Prometheus on the deployed files; the server does the log role, too."""
    address = f"127.0.0.1:{phoenix.port}"
    with PrometheusServer({"phoenix-api": [address], "phoenix-log": [address]}) as server:
        wait_until(lambda: len(server.query("up == 1")) == 2, DEADLINE_S, "both targets are up")
        for _ in range(20):
            httpx.post(
                f"{phoenix.url}/predict", json={"model_id": "linear", "entity_id": "e1"}
            ).raise_for_status()
        # A later scrape sees more of it, so that there are rates.
        wait_until(lambda: _ask_until_there_is_a_rate(phoenix, server), DEADLINE_S, "there is a rate")
        yield server


def _ask_until_there_is_a_rate(phoenix: PhoenixServer, prometheus: PrometheusServer) -> bool:
    httpx.post(f"{phoenix.url}/predict", json={"model_id": "linear", "entity_id": "e1"}).raise_for_status()
    return bool(prometheus.query("sum(rate(phoenix_predictions_total[1m])) > 0"))


@pytest.mark.system
def test_prometheus_scrapes_the_server(prometheus: PrometheusServer) -> None:
    """Under the jobs that the rules name."""
    up = {sample["metric"]["job"]: sample["value"][1] for sample in prometheus.query("up")}

    assert up == {"phoenix-api": "1", "phoenix-log": "1"}


@pytest.mark.system
def test_every_rule_is_evaluated(prometheus: PrometheusServer) -> None:
    """The rules run against real metrics without an error."""
    rules: list[dict[str, Any]] = []

    def are_evaluated() -> bool:
        nonlocal rules
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return all(rule["health"] != "unknown" for rule in rules)

    wait_until(are_evaluated, DEADLINE_S, "each rule was evaluated")
    assert {rule["name"]: "ok" for rule in rules} == {rule["name"]: rule["health"] for rule in rules}
    assert len(rules) == RULES.count("- alert:") + RULES.count("- record:")


@pytest.mark.system
@pytest.mark.parametrize("title", QUERIES)
def test_every_query_of_the_dashboard_finds_data(prometheus: PrometheusServer, title: str) -> None:
    """A panel that shows nothing is noticed when it is needed."""
    expression = _as_grafana_sends_it(QUERIES[title])

    if title in MAY_BE_EMPTY:
        prometheus.query(expression)
        return
    wait_until(lambda: bool(prometheus.query(expression)), DEADLINE_S, f"{expression} finds something")


@pytest.mark.system
def test_the_choice_of_models_has_entries(prometheus: PrometheusServer) -> None:
    """The dashboard's variable lists the models that were asked."""
    (variable,) = DASHBOARD["templating"]["list"]
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert asked

    found = prometheus.get(f"label/{asked[2]}/values", **{"match[]": asked[1]})

    assert "linear" in found


def _as_grafana_sends_it(expression: str) -> str:
    return expression.replace("$__rate_interval", "1m").replace("$model", ".*")


def test_the_dashboard_is_laid_out() -> None:
    """Each panel has an id, a title and a place of its own, and asks the data source that is provisioned."""
    panels = DASHBOARD["panels"]
    provisioned = (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    uid = re.search(r"uid: (\S+)", provisioned)
    assert uid

    cells: list[tuple[int, int]] = []
    for panel in panels:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells += [(x, y) for x in columns for y in rows]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {uid[1]}
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len(panels) == len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels})
