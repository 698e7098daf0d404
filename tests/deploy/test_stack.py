"""The containers' commands and settings of compose.yaml, as processes on real servers."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx_models
import pytest
import yaml
from deploy_servers import ROOT, NginxServer, PrometheusServer
from phoenix_server import PhoenixServer
from servers import HOST, free_port, wait_until
from traffic import await_logged

DEADLINE_S = 30
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


@pytest.mark.system
@pytest.mark.timeout(300)
def test_the_commands_of_the_containers_work_together(
    tmp_path: Path, kafka_url: str, postgres_url: str, redis_url: str
) -> None:
    """Predictions through nginx on two servers end up once in PostgreSQL by way of Kafka, and no alert fires."""
    places = {
        r"postgresql://.*": postgres_url,
        r"redis://.*": redis_url,
        r"kafka://.*": kafka_url,
        r"file:/artifacts": f"file:{tmp_path}/artifacts",
    }

    def as_in(service: str) -> PhoenixServer:
        settings = {}
        for name, value in SERVICES[service]["environment"].items():
            if value is None:  # as docker-compose has .env say it, and here says nothing
                continue
            for pattern, place in places.items():
                value = place if re.fullmatch(pattern, value) else value  # noqa: PLW2901
            # As docker-compose does it then.
            value = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value)  # noqa: PLW2901
            settings[name.removeprefix("PHOENIX_").lower()] = value
        # Here each listens on a port of its own, and only for this machine.
        own: dict[str, Any] = {
            "data": tmp_path / service / "data",
            "host": HOST,
            "workers": 1,
            "insecure": False,
        }
        flags = SERVICES[service]["command"]
        roles = {"roles": flags[flags.index("--roles") + 1]} if "--roles" in flags else {}
        return PhoenixServer(tmp_path / service, **(settings | own | roles))

    migrated = as_in("migrate").command(*SERVICES["migrate"]["command"][1:])
    assert migrated.returncode == 0, migrated.stderr
    apis = [as_in("api-1"), as_in("api-2")]
    model = onnx_models.write(tmp_path / "linear.onnx", onnx_models.linear_regressor())
    apis[0].register(model, "linear", "1.0.0")
    log_port = free_port()
    *log_command, metrics_port = SERVICES["log"]["command"][1:]
    assert metrics_port == "9100"
    log_worker = as_in("log").popen(*log_command, str(log_port), log=tmp_path / "log.log")
    monitor_port = free_port()
    monitor_command = SERVICES["monitor"]["command"][1:-1]
    monitor = as_in("monitor").popen(*monitor_command, str(monitor_port), log=tmp_path / "monitor.log")
    try:
        with apis[0], apis[1], NginxServer([api.port for api in apis]) as nginx, nginx.client() as client:
            answers = [
                client.post("/predict", json={"model_id": "linear", "features": [1, 2, 3]}).json()
                for _ in range(100)
            ]
            ids = {answer["prediction_id"] for answer in answers}
            with apis[0].opened() as phoenix:
                rows = await_logged(phoenix, "linear", ids)
            assert dict.fromkeys(ids, 1) == Counter(row.id for row in rows)
            targets = {
                "phoenix-api": [f"{HOST}:{api.port}" for api in apis],
                "phoenix-log": [f"{HOST}:{log_port}"],
                "phoenix-monitor": [f"{HOST}:{monitor_port}"],
            }
            _assert_that_all_is_well(targets)
    finally:
        for name, worker in (("log", log_worker), ("monitor", monitor)):
            worker.terminate()
            assert worker.wait(60) == 0, (tmp_path / f"{name}.log").read_text()


def _assert_that_all_is_well(targets: dict[str, list[str]]) -> None:
    with PrometheusServer(targets) as prometheus:
        wait_until(lambda: len(prometheus.query("up == 1")) == 4, DEADLINE_S, "all four are scraped")
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

        def firing() -> list[str]:
            return [
                rule["name"]
                for rule in rules
                if rule["type"] == "alerting" and prometheus.query(rule["query"])
            ]

        def counted() -> list[str]:
            return [
                sample["value"][1]
                for name in (
                    'phoenix_log_rows_total{job="phoenix-log"}',
                    'phoenix_ship_acknowledged_total{job="phoenix-api"}',
                )
                for sample in prometheus.query(f"sum({name})")
            ]

        # A role that was scraped while it started has a minute to be there, before that fires.
        with suppress(TimeoutError):
            wait_until(lambda: firing() == [], DEADLINE_S, "nothing fires")
        with suppress(TimeoutError):
            wait_until(lambda: counted() == ["100", "100"], DEADLINE_S, "all is counted")
        assert (firing(), counted()) == ([], ["100", "100"])
