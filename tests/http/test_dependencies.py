"""What callers see while Redis or PostgreSQL is away, and the same server on both of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import zoo
from click.testing import CliRunner
from lanes import ServerLane, ask_anew, eventually, logged, ok, refused, store_features
from phoenix_server import PhoenixServer
from proxy import FaultProxy
from servers import wait_until

from phoenix_ml.cli import main
from phoenix_ml.infrastructure.sql.database import Database

pytestmark = pytest.mark.system

ABC = {"model_id": "abc", "features": [1, 2, 3]}
ENTITY = {"model_id": "abc", "entity_id": "cust_1"}


def with_model(server: PhoenixServer, tmp_path: Path) -> PhoenixServer:
    """The server with the model `abc`, the weighted sum of a, b and c."""
    artifact = zoo.linear(tmp_path / "abc.onnx", [1, 2, 3])
    server.register(artifact, "abc", "1.0.0", contract=zoo.ABC)
    return server


def test_while_redis_is_down_or_late_the_features_of_requests_serve(redis_url: str, tmp_path: Path) -> None:
    """A store that is down is no reason to refuse those who bring their features along."""
    with FaultProxy.in_front_of(redis_url) as redis:
        settings: dict[str, Any] = {
            "features": redis.redirect(redis_url),
            "features_deadline_ms": 3000,
        }
        with with_model(PhoenixServer(tmp_path / "server", **settings), tmp_path) as server:
            lane = ServerLane(server.url)
            store_features(lane, "cust_1", a=1, b=1, c=1)
            stored = ok(lane.request("POST", "/predict", json=ENTITY))

            redis.down()
            refusal = lane.request("POST", "/predict", json=ENTITY)
            given = lane.request("POST", "/predict", json={**ENTITY, "features": {"a": 2, "b": 2, "c": 2}})
            part = lane.request("POST", "/predict", json={**ENTITY, "features": {"a": 2, "b": 2}})
            rows = [{"features": [1, 2, 3]}, {"entity_id": "cust_1"}]
            batch = lane.request("POST", "/predict/batch", json={"model_id": "abc", "instances": rows})
            without_store = lane.request("POST", "/predict", json=ABC)
            managed = lane.request("GET", "/features/cust_1")
            ready = ok(lane.request("GET", "/health/ready"))
            live = ok(lane.request("GET", "/health/live"))
            row = logged(lane, ok(given)["prediction_id"])

            redis.up()
            recovered = eventually(
                lambda: lane.request("POST", "/predict", json=ENTITY),
                lambda response: response.status_code == 200,
                "the store is asked again by itself",
            )
            ready_again = eventually(
                lambda: lane.request("GET", "/health/ready"),
                lambda response: response.json()["status"] == "ok",
                "health says so",
            )

            redis.hang()
            late = lane.request("POST", "/predict", json=ENTITY)
            at_once = lane.request("POST", "/predict", json=ENTITY)
            meanwhile = lane.request("POST", "/predict", json={**ENTITY, "features": [2, 2, 2]})
            redis.up()
            eventually(
                lambda: lane.request("POST", "/predict", json=ENTITY),
                lambda response: response.status_code == 200,
                "it recovers from that, too",
            )
            lane.close()

    assert (stored["result"], stored["feature_sources"]) == (6, "store")
    error = refused(refusal, 503, "feature_store_unavailable")
    assert error["details"]["store"] == "redis"
    assert "redis" in error["message"]
    assert int(refusal.headers["retry-after"]) >= 1
    assert (ok(given)["result"], ok(given)["feature_sources"]) == (12, "request")
    assert row["feature_sources"] == "request"
    # Whether `c` is in the store nobody can tell now, so it is not said to be missing.
    refused(part, 503, "feature_store_unavailable")
    assert refused(batch, 503, "feature_store_unavailable")["details"]["instance"] == 1
    assert ok(without_store)["result"] == 14
    refused(managed, 503, "feature_store_unavailable")
    assert ready["status"] == "degraded"
    assert "redis" in ready["checks"]["features"]
    assert ready["checks"]["database"] == "ok"
    assert live == {"status": "ok"}
    assert recovered.json()["feature_sources"] == "store"
    assert ready_again.status_code == 200
    # Late is worse than down, as each caller would wait: so only the first one does.
    assert "3000 ms" in refused(late, 503, "feature_store_unavailable")["message"]
    refused(at_once, 503, "feature_store_unavailable")
    assert late.elapsed.total_seconds() > 2.9 > at_once.elapsed.total_seconds()
    assert ok(meanwhile)["feature_sources"] == "request"


def test_a_server_on_postgresql_and_redis_does_the_same(
    postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    """Each part becomes a real server by changing one URL."""
    settings: dict[str, Any] = {
        "database": postgres_url,
        "features": redis_url,
        "features_deadline_ms": 3000,
    }
    server = PhoenixServer(tmp_path / "server", **settings)

    refusal = server.command("serve")
    upgraded = CliRunner().invoke(main, ["db", "upgrade"], env={"PHOENIX_DATABASE": postgres_url})

    assert refusal.returncode == 1
    assert "phoenix-ml db upgrade" in refusal.stderr
    assert "Traceback" not in refusal.stderr
    assert upgraded.exit_code == 0, upgraded.output
    assert "is at revision" in upgraded.stdout
    with with_model(server, tmp_path):
        lane = ServerLane(server.url)
        store_features(lane, "cust_1", a=1, b=2, c=0.5)
        answer = ok(lane.request("POST", "/predict", json=ENTITY))
        ok(
            lane.request(
                "POST", "/feedback", json={"prediction_id": answer["prediction_id"], "outcome": "good"}
            ),
            202,
        )
        row = logged(lane, answer["prediction_id"])
        listed = ok(
            lane.request("GET", "/predictions", params={"entity_id": "cust_1", "since": row["created_at"]})
        )
        eventually(
            lambda: lane.request("GET", f"/predictions/{answer['prediction_id']}"),
            lambda found: found.json()["outcome"] == "good",
            "the outcome is attached",
        )
        ready = ok(lane.request("GET", "/health/ready"))
        nul = lane.request("GET", "/models/a%00b")
        nul_entity = lane.request("GET", "/predictions", params={"entity_id": "a\0b"})
        long_id = lane.request("GET", f"/models/{'m' * 2000}")
        lane.close()
        code = server.stop()

    assert (answer["result"], answer["feature_sources"]) == (6.5, "store")
    assert row["features"] == {"a": 1.0, "b": 2.0, "c": 0.5}
    assert [item["prediction_id"] for item in listed["items"]] == [answer["prediction_id"]]
    assert ready["status"] == "ok"
    refused(nul, 400, "malformed_body")
    refused(nul_entity, 400, "malformed_body")
    refused(long_id, 404, "model_unknown")
    assert code == 0
    assert "Traceback" not in server.log()


def test_while_postgresql_is_down_predictions_go_on_and_are_logged_later(
    postgres_url: str, tmp_path: Path
) -> None:
    """The table is in memory and the journal on disk: only management waits for the database."""
    with FaultProxy.in_front_of(postgres_url) as postgres:
        server = PhoenixServer(tmp_path / "server", database=postgres.redirect(postgres_url))
        database = Database(postgres_url)
        database.upgrade()
        database.close()
        with with_model(server, tmp_path):
            lane = ServerLane(server.url)
            ok(lane.request("POST", "/predict", json=ABC))

            postgres.down()
            answer = ok(lane.request("POST", "/predict", json=ABC))
            reported = lane.request(
                "POST", "/feedback", json={"prediction_id": answer["prediction_id"], "outcome": 1}
            )
            listing = lane.request("GET", "/models")
            log = lane.request("GET", "/predictions")
            activation = lane.request("POST", "/models/abc/versions/1.0.0/activate")
            ready = ok(lane.request("GET", "/health/ready"))
            killed = server.kill_child("api-0")
            server.wait_for_child("api-0", after=killed)
            restarted = _first_answer(server)

            postgres.up()
            row = logged(lane, answer["prediction_id"])
            eventually(
                lambda: lane.request("POST", "/predict", json=ABC),
                lambda response: response.status_code == 200,
                "the new process has read the registry",
            )
            lane.close()

    ok(reported, 202)
    for response in (listing, log, activation):
        refused(response, 503, "database_unavailable")
        assert int(response.headers["retry-after"]) >= 1
    assert ready["status"] == "degraded"
    assert "does not answer" in ready["checks"]["database"]
    # A process that could not read the registry knows no model, which is not the same as "unknown".
    refused(restarted, 503, "database_unavailable")
    assert row["result"] == 14


def test_while_kafka_is_down_readiness_says_so_and_predictions_go_on(tmp_path: Path) -> None:
    """Whoever looks at it must not believe that events arrive; whoever asks for predictions is not concerned."""
    server = PhoenixServer(tmp_path / "server", events="kafka://127.0.0.1:1", roles="ship")
    with with_model(server, tmp_path):
        lane = ServerLane(server.url)
        background = server.pids()["background"]
        ready = eventually(
            lambda: lane.request("GET", "/health/ready"),
            lambda response: response.json()["status"] != "ok",
            "health says so",
        )
        answer = lane.request("POST", "/predict", json=ABC)
        still = server.pids()["background"]
        lane.close()

    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    wrong = {name: said for name, said in ready.json()["checks"].items() if said != "ok"}
    assert wrong == {"log": "predictions wait in the journal: no role gets them to kafka://127.0.0.1:1"}
    assert ok(answer)["result"] == 14
    assert still == background


def _first_answer(server: PhoenixServer) -> httpx.Response:
    """The first answer of a process that is starting."""
    answers: list[httpx.Response] = []

    def answered() -> bool:
        try:
            answers.append(ask_anew(server.url, ABC))
        except httpx.TransportError:
            return False
        return True

    wait_until(answered, 60, "the new process answers")
    return answers[0]
