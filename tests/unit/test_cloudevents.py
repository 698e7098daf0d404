"""The event format: what Kafka carries can be read by its documentation, by this version and by the next."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from sample_events import COLUMNS, SCHEMA, outcome, prediction

from phoenix_ml.application.ports import RecordedEvent, UnreadableEvent
from phoenix_ml.domain.events import Event, ModelChanged, OutcomeReported, PredictionMade
from phoenix_ml.domain.ids import new_id
from phoenix_ml.domain.routing import Role, Strategy
from phoenix_ml.domain.rows import Column, ElementType
from phoenix_ml.infrastructure.events.cloudevents import Message, decode_message, encode_record
from phoenix_ml.infrastructure.events.local import LocalEvents

SCHEMAS = Path(__file__).parents[2] / "docs" / "reference" / "schemas"
VERSION_1_SEGMENT = next((Path(__file__).parents[1] / "data").glob("*.segment"))
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300)
finite = st.floats(allow_nan=False, allow_infinity=False)
predictions = st.builds(
    prediction,
    st.tuples(st.floats(width=32, allow_nan=False), texts, st.integers(-(2**63), 2**63 - 1)),
    model_id=texts.filter(lambda text: 0 < len(text.encode()) <= 128),
    entity_id=st.none() | texts,
    request_id=texts,
    routing_key=texts,
    result=st.integers(-(2**63), 2**63 - 1) | finite | texts,
    confidence=st.none() | finite,
    probabilities=st.none() | st.lists(finite, max_size=5),
    shadow_of=st.none() | st.builds(new_id),
    traceparent=st.sampled_from([None, TRACEPARENT]),
    device=st.sampled_from(["cpu", "cuda:0", "tensorrt:12"]),
)
outcomes = st.builds(
    outcome,
    st.builds(new_id),
    finite | texts | st.booleans() | st.dictionaries(texts, st.none() | finite),
    st.integers(-(2**40), 2**40),
)


def message_of(event: Event) -> Message:
    return encode_record(msgspec.msgpack.encode(event), SCHEMA)


def schema(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    return document


def as_json(value: bytes) -> Any:
    """What a reader of any language sees after decoding; binary becomes base64, as the schema says."""
    return json.loads(msgspec.json.encode(msgspec.msgpack.decode(value)))


@given(predictions | outcomes)
def test_an_event_comes_back_as_it_went(event: Event) -> None:
    """Whatever callers send as ids and texts, the log gets it as it was answered."""
    message = message_of(event)

    back = decode_message(message.value, message.headers)

    assert isinstance(back, RecordedEvent)
    assert back.event == event
    assert back.row_format is None or back.row_format.columns == COLUMNS


@given(predictions)
def test_headers_are_cut_from_the_right_place(event: PredictionMade) -> None:
    """They are cut from the bytes without decoding them: no text of a caller's may shift the cut."""
    headers = dict(message_of(event).headers)

    made_at = datetime.fromtimestamp((UUID(event.id).int >> 80) / 1000, UTC)
    assert headers == {
        "ce_specversion": b"1.0",
        "ce_type": b"phoenix-ml.prediction-made",
        "ce_source": b"/phoenix-ml",
        "ce_dataschema": b"urn:phoenix-ml:prediction-made:3",
        "content-type": b"application/msgpack",
        "ce_id": event.id.encode(),
        "ce_time": made_at.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode(),
    } | ({"traceparent": TRACEPARENT.encode()} if event.traceparent else {})


def test_outcomes_have_the_key_of_their_prediction() -> None:
    """Messages of one key keep their order, so an outcome follows its prediction."""
    made = prediction()
    told = outcome(made.id)

    assert message_of(told).key == message_of(made).key == made.id.encode()


@given(predictions)
def test_real_predictions_are_valid_by_the_published_schema(event: PredictionMade) -> None:
    """Whoever reads the topic builds on the schema: it must be true."""
    Draft202012Validator(schema("prediction-made")).validate(as_json(message_of(event).value))


@given(outcomes)
def test_real_outcomes_are_valid_by_the_published_schema(event: OutcomeReported) -> None:
    """As for predictions."""
    Draft202012Validator(schema("outcome-reported")).validate(as_json(message_of(event).value))


def test_an_announcement_is_valid_by_the_published_schema() -> None:
    """As for predictions."""
    change = ModelChanged(new_id(), "risk", None, "routing", "ann", 1_760_000_000_000)

    Draft202012Validator(schema("model-changed")).validate(json.loads(msgspec.json.encode(change)))


@pytest.mark.parametrize(
    ("name", "kind"), [("prediction-made", PredictionMade), ("outcome-reported", OutcomeReported)]
)
def test_schemas_name_every_field_in_its_place(name: str, kind: type) -> None:
    """An array's readers count: a field that is missing in the schema shifts all that follow."""
    items = schema(name)["prefixItems"][0]["prefixItems"]

    assert [item["title"] for item in items] == ["kind", *kind.__struct_fields__]  # type: ignore[attr-defined]


def test_schema_lists_the_strategies_roles_and_elements_that_exist() -> None:
    """A new one must not make real events invalid."""
    document = schema("prediction-made")
    fields = {item["title"]: item for item in document["prefixItems"][0]["prefixItems"]}
    elements = document["prefixItems"][1]["items"]["prefixItems"][1]

    assert set(fields["strategy"]["enum"]) == {strategy.value for strategy in Strategy}
    assert set(fields["role"]["enum"]) == {role.value for role in Role}
    assert set(elements["enum"]) == {element.value for element in ElementType}


@pytest.fixture
def version_1(tmp_path: Path) -> LocalEvents:
    """A journal that the last release without Kafka has written: two predictions and an outcome."""
    (tmp_path / "api-0").mkdir()
    shutil.copy(VERSION_1_SEGMENT, tmp_path / "api-0")
    return LocalEvents(tmp_path)


def test_journals_of_the_previous_version_are_read(version_1: LocalEvents) -> None:
    """An update must not turn what is still in the journal into dead letters."""
    first, shadow, told = version_1.read(10)

    assert isinstance(first, RecordedEvent)
    assert isinstance(shadow, RecordedEvent)
    assert isinstance(told, RecordedEvent)
    expected = prediction(id="01928c5a-0000-7000-8000-000000000001")
    assert first.event == expected
    assert first.row_format is not None
    assert first.row_format.columns == COLUMNS
    assert isinstance(shadow.event, PredictionMade)
    assert (shadow.event.shadow_of, shadow.event.traceparent) == (expected.id, None)
    assert told.event == OutcomeReported(
        "01928c5a-0000-7000-8000-000000000003", expected.id, "yes", 1_760_000_000_200, 1_760_000_000_300
    )


def test_events_of_the_previous_version_are_shipped_as_such_and_read(version_1: LocalEvents) -> None:
    """Old journals go to Kafka, too, and a reader must know which version it has before it."""
    for item in version_1.read(10):
        assert isinstance(item, RecordedEvent)
        message = encode_record(item.payload, item.origin.schema or b"")
        back = decode_message(message.value, message.headers)
        assert isinstance(back, RecordedEvent)
        assert back.event == item.event
        version = 1 if isinstance(item.event, PredictionMade) else 3
        assert dict(message.headers)["ce_dataschema"].endswith(b":%d" % version)


def test_events_of_a_later_version_wait_for_an_update(version_1: LocalEvents) -> None:
    """Read as far as it is known, a later event would lose its new fields for good."""
    message = message_of(prediction())
    later = [
        (name, value.replace(b":3", b":4") if name == "ce_dataschema" else value)
        for name, value in message.headers
    ]

    found = decode_message(message.value, later)

    assert isinstance(found, UnreadableEvent)
    assert "schema version 4" in found.reason
    assert "events dead requeue" in found.reason


@pytest.mark.parametrize(
    ("value", "headers", "words"),
    [
        (b"{}", [], "no header ce_dataschema"),
        (b"{}", [("ce_dataschema", b"urn:other:thing:1")], "header ce_dataschema is b'urn:other:thing:1'"),
        (b"", [("ce_dataschema", b"urn:phoenix-ml:prediction-made:3")], "not an event"),
        (b"\x92\xc0\xc0", [("ce_dataschema", b"urn:phoenix-ml:prediction-made:3")], "not an event"),
        (b"\xc1", [("ce_dataschema", b"urn:phoenix-ml:prediction-made:3")], "not an event"),
        (b"\x91" * 5000, [("ce_dataschema", b"urn:phoenix-ml:prediction-made:3")], "not an event"),
    ],
)
def test_a_foreign_message_is_unreadable_and_says_why(
    value: bytes, headers: list[tuple[str, bytes]], words: str
) -> None:
    """Anyone may write to a topic; what is not ours must be put aside, not stop the stream."""
    found = decode_message(value, headers)

    assert isinstance(found, UnreadableEvent)
    assert words in found.reason


@given(st.binary(max_size=200), st.booleans())
def test_bytes_that_are_no_event_are_never_shipped(garbage: bytes, with_tag: bool) -> None:
    """Whatever a journal may hold: either a message that can be read back, or a ValueError."""
    payload = b"\xdc\x00\x16\xaaprediction\xd9\x24" + garbage if with_tag else garbage

    with pytest.raises(ValueError):
        encode_record(payload, SCHEMA)


def test_a_prediction_whose_columns_are_lost_is_not_shipped() -> None:
    """Its inputs would be bytes without names."""
    payload = msgspec.msgpack.encode(prediction(model_version="9.9.9"))

    with pytest.raises(ValueError, match="schema"):
        encode_record(payload, SCHEMA)


def test_columns_are_told_in_pairs() -> None:
    """The documented form, spelled out once."""
    described = msgspec.msgpack.encode({"1.0.0": (Column("age", ElementType.FLOAT64),)})
    message = encode_record(msgspec.msgpack.encode(prediction()), described)

    assert msgspec.msgpack.decode(message.value)[1] == [["age", "float64"]]
