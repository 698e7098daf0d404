"""The examples that read events, executed as a reader would."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from sample_events import SCHEMA, outcome, prediction
from servers import wait_until

from phoenix_ml.infrastructure.events.cloudevents import encode_record
from phoenix_ml.infrastructure.events.kafka import INFERENCE_EVENTS, Kafka, KafkaOutbox

_DOCS = Path(__file__).parents[2] / "docs"
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _example(page: str) -> str:
    (found,) = _PYTHON.findall((_DOCS / page).read_text())
    return str(found)


def test_the_reference_shows_how_to_read_the_features() -> None:
    """Packed values are useless to a reader who cannot unpack them."""
    message = encode_record(msgspec.msgpack.encode(prediction()), SCHEMA)
    names: dict[str, Any] = {"message": SimpleNamespace(value=lambda: message.value)}

    exec(_example("reference/events.md"), names)

    assert names["features"] == {"income": 1.5, "visits": 7, "city": "Oslo"}


@contextmanager
def _running(script: Path, output: Path) -> Iterator[None]:
    with output.open("wb") as file:
        process = subprocess.Popen([sys.executable, str(script)], stdout=file, stderr=file)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.system
def test_the_program_that_follows_events_tells_what_was_predicted_and_what_came_of_it(
    tmp_path: Path, kafka_url: str
) -> None:
    """Copied from the page, with the reader's broker and prefix, it works on a real broker."""
    parts = urlsplit(kafka_url)
    kafka = Kafka(kafka_url, 1)
    kafka.create_topics()
    made = prediction()
    known = outcome(made.id, "repaid")
    outbox = KafkaOutbox(kafka)
    encode = msgspec.msgpack.encode
    outbox.send(INFERENCE_EVENTS, [encode_record(encode(made), SCHEMA), encode_record(encode(known), b"")])
    outbox.close()
    script, output = tmp_path / "follow.py", tmp_path / "output"
    code = _example("how-to/use-kafka.md").replace("broker-1:9092", parts.netloc)
    script.write_text(code.replace("credit.inference-events", kafka.full_name(INFERENCE_EVENTS)))

    with _running(script, output):
        wait_until(lambda: len(output.read_text().splitlines()) >= 2, 60, f"two lines in {output}")

    expected = [f"{made.id}: risk 1.0.0 says 1 of cust_99", f"{made.id}: it was repaid"]
    assert output.read_text().splitlines() == expected
