"""Scraping, alerts and dashboards of the deployment, on a real Prometheus that scrapes a real server."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import onnx_models
import pytest
import yaml
from dashboards import DASHBOARDS, as_sent_to_prometheus, promql_queries
from deploy_servers import DEPLOY, ROOT, PrometheusServer, program
from phoenix_server import PhoenixServer
from servers import wait_until

from phoenix_ml.domain.monitoring import ALL_MODELS
from phoenix_ml.domain.routing import Arm, Role, Routing, Strategy
from phoenix_ml.infrastructure.telemetry.catalogue import CATALOGUE
from phoenix_ml.infrastructure.telemetry.metrics import Histogram

RULES = (DEPLOY / "prometheus" / "rules.yml").read_text()
RULE_TESTS = (DEPLOY / "prometheus" / "rules_test.yml").read_text()
ALERTS = [rule for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"] if "alert" in rule]
QUERIES = promql_queries()
# What each alert looks at, before it compares.
SELECTORS = sorted(
    set(re.findall(r"(?<![\w:])(?:phoenix_\w+|up)\b(?:{[^}]*})?", "\n".join(rule["expr"] for rule in ALERTS)))
)
JOBS = [
    job["job_name"]
    for job in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
]
# Two batches of 200, the least that the monitor calls one.
ENOUGH_ROWS = 400
# Rules are evaluated every 15 s, and targets scraped every 2 s.
DEADLINE_S = 60
# A process may have to start first.
ANSWER_DEADLINE_S = 60


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


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_every_alert_has_a_runbook(alert: dict[str, Any]) -> None:
    """Whoever is woken up is told what to do, in a place that exists."""
    path, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)

    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert anchor == alert["alert"].lower()
    assert anchor in anchors


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    """A server to which happened whatever has no series before it happens.

    `linear` has a shadow that cannot answer, `broken` does not load, and a process has died. The monitor knows the
    truth about enough predictions of `linear` and of `risk`, a classifier.
    """
    server = PhoenixServer(tmp_path_factory.mktemp("watched"), features_cache_ms=50)
    model = onnx_models.write(server.folder / "linear.onnx", onnx_models.linear_regressor())
    features = _features()
    errors = np.random.default_rng(8).normal(size=ENOUGH_ROWS)
    truths = np.array(features["x_0"]) + errors
    known = {"linear": truths, "risk": (truths > 0).astype(int)}
    references = {name: features | {"truth": truth.tolist()} for name, truth in known.items()}
    names = server.register(
        model, "linear", "1.0.0", reference=references["linear"], outcome="truth"
    ).metadata.features
    classifier = onnx_models.write(server.folder / "risk.onnx", onnx_models.binary_classifier())
    server.register(classifier, "risk", "1.0.0", reference=references["risk"], outcome="truth")
    wider = onnx_models.write(server.folder / "wider.onnx", onnx_models.linear_regressor(4))
    server.register(wider, "linear", "2.0.0")
    broken = server.register(wider, "broken", "1.0.0", activate=False)
    with server.opened() as opened:
        arms = Arm("1.0.0", Role.CHAMPION), Arm("2.0.0", Role.SHADOW)
        opened.registry.set_routing("linear", Routing(Strategy.SHADOW, arms), "test")
        opened.monitoring.change_settings(ALL_MODELS, {"batch_rows": 200}, "test")
    with server:
        stored = dict.fromkeys(names, 1.0)
        httpx.put(f"{server.url}/features/e1", json={"features": stored}).raise_for_status()
        (server.data / "artifacts" / broken.uri).unlink()
        with server.opened() as opened:
            opened.registry.set_active("broken", "1.0.0", True, "test")
        server.wait_for_child("api-0", after=server.kill_child("api-0"))
        for model_id in ("linear", "risk"):
            _predict_and_learn(server, model_id)
        yield server


def _features() -> dict[str, list[float]]:
    values = np.random.default_rng(7).normal(size=(3, ENOUGH_ROWS))
    return {f"x_{number}": column.tolist() for number, column in enumerate(values)}


def _predict_and_learn(server: PhoenixServer, model_id: str) -> None:
    """Two batches of predictions, of which two thirds turn out to be right."""
    rows = zip(*_features().values(), strict=True)
    asked = {"model_id": model_id, "instances": [{"features": row} for row in rows]}
    answered = (
        httpx.post(f"{server.url}/predict/batch", json=asked, timeout=ANSWER_DEADLINE_S)
        .raise_for_status()
        .json()
    )
    outcomes = [
        {"prediction_id": one["prediction_id"], "outcome": one["result"] if number % 3 else 1 - one["result"]}
        for number, one in enumerate(answered["predictions"])
    ]
    httpx.post(f"{server.url}/feedback", json=outcomes, timeout=ANSWER_DEADLINE_S).raise_for_status()


@pytest.fixture(scope="module")
def prometheus(phoenix: PhoenixServer) -> Iterator[PrometheusServer]:
    """Prometheus on the deployed files; the server does all the roles."""
    address = f"127.0.0.1:{phoenix.port}"
    with PrometheusServer({job: [address] for job in JOBS}) as server:
        wait_until(lambda: len(server.query("up == 1")) == len(JOBS), DEADLINE_S, "all targets are up")
        for _ in range(20):
            _ask(phoenix)
        # A later scrape sees more of it, so that there are rates.
        wait_until(lambda: _ask_until_there_is_a_rate(phoenix, server), DEADLINE_S, "there is a rate")
        yield server


def _ask_until_there_is_a_rate(phoenix: PhoenixServer, prometheus: PrometheusServer) -> bool:
    _ask(phoenix)
    return bool(prometheus.query("sum(rate(phoenix_predictions_total[1m])) > 0"))


def _ask(phoenix: PhoenixServer) -> None:
    answers = [
        httpx.post(
            f"{phoenix.url}/predict", json={"model_id": name, "entity_id": "e1"}, timeout=ANSWER_DEADLINE_S
        )
        for name in ("linear", "broken")
    ]
    answers[0].raise_for_status()


@pytest.mark.system
def test_prometheus_scrapes_the_server(prometheus: PrometheusServer) -> None:
    """Under the jobs that the rules name."""

    def up() -> dict[str, str]:
        return {sample["metric"]["job"]: sample["value"][1] for sample in prometheus.query("up")}

    wait_until(lambda: up() == dict.fromkeys(JOBS, "1"), DEADLINE_S, "each job is up")


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
@pytest.mark.parametrize("name", QUERIES)
def test_every_query_of_the_dashboards_finds_data(prometheus: PrometheusServer, name: str) -> None:
    """A panel that shows nothing is noticed when it is needed."""
    # Where nothing has to be found, as of alerts that fire, 0 is shown; here there is something of each.
    query = QUERIES[name].replace(" or vector(0)", "")
    # A classifier has an accuracy, a regressor an error, and what does not load answers 5xx.
    expressions = [as_sent_to_prometheus(query, model) for model in ("linear", "risk", "broken")]

    wait_until(
        lambda: any(map(prometheus.query, expressions)), DEADLINE_S, f"{expressions[0]} finds something"
    )


@pytest.mark.system
@pytest.mark.parametrize("selector", SELECTORS)
def test_what_the_alerts_look_at_is_there(prometheus: PrometheusServer, selector: str) -> None:
    """On a real server, with the labels that they ask for; an alert on what does not exist never fires."""
    wait_until(lambda: bool(prometheus.query(selector)), DEADLINE_S, f"{selector} finds something")


@pytest.mark.system
@pytest.mark.parametrize("file", DASHBOARDS)
def test_the_choice_of_models_has_entries(prometheus: PrometheusServer, file: str) -> None:
    """A dashboard's variable lists the models that were asked."""
    for variable in DASHBOARDS[file]["templating"]["list"]:
        asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert asked

        found = prometheus.get(f"label/{asked[2]}/values", **{"match[]": asked[1]})

        assert "linear" in found
