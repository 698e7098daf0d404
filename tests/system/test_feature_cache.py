"""The feature cache in a server of its own: the setting switches it on, and the metrics tell what it does."""

from pathlib import Path

import httpx
import pytest
import zoo
from lanes import eventually
from phoenix_server import PhoenixServer

pytestmark = pytest.mark.system


def test_the_cache_answers_repeated_reads_and_counts_them(tmp_path: Path) -> None:
    """Whether it is worth its staleness is what an operator reads off hits and misses."""
    with PhoenixServer(tmp_path, features_cache_ms=60_000) as server:
        server.register(zoo.linear(tmp_path / "abc.onnx", [1, 2, 3]), "abc", "1.0.0", contract=zoo.ABC)
        with httpx.Client(base_url=server.url) as client:

            def stored(**features: float) -> None:
                assert client.put("/features/e", json={"features": features}).status_code == 200

            def predict() -> httpx.Response:
                return client.post("/predict", json={"model_id": "abc", "entity_id": "e"})

            stored(a=1, b=1, c=1)
            eventually(predict, lambda answer: answer.status_code == 200, "the model is loaded")
            before = counts(client)
            results = [predict().json()["result"] for _ in range(3)]
            stored(a=2)
            results.append(predict().json()["result"])
            after = counts(client)

    assert results == [6.0, 6.0, 6.0, 7.0]
    assert (after["hit"] - before["hit"], after["miss"] - before["miss"]) == (3, 1)


def counts(client: httpx.Client) -> dict[str, int]:
    lines = client.get("/metrics").text.splitlines()
    return {
        outcome: sum(
            int(float(line.split()[-1]))
            for line in lines
            if line.startswith("phoenix_feature_cache_reads_total") and f'"{outcome}"' in line
        )
        for outcome in ("hit", "miss")
    }
