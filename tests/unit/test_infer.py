"""The use case behind ``infer``: rows or tensors, one or many, each on record."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx_models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inprocess import Server

from phoenix_ml.application.infer import Inferred, InferRequest, RowForm, form_of
from phoenix_ml.application.ports import RecordedEvent
from phoenix_ml.application.serving import INLINE_LIMIT_S, ServedVersion
from phoenix_ml.domain.errors import JournalFull
from phoenix_ml.domain.events import PredictionMade, PredictionsMade
from phoenix_ml.domain.ids import batch_ids, new_batch_id, new_id
from phoenix_ml.domain.models import ModelVersion
from phoenix_ml.domain.routing import Role, Strategy
from phoenix_ml.domain.rows import Column, ElementType
from phoenix_ml.domain.tensors import DATATYPE_OF, DTYPE_OF, Tensor
from phoenix_ml.infrastructure.events.dropping import DroppingJournal
from phoenix_ml.infrastructure.events.journal import JournalReader, JournalWriter
from phoenix_ml.infrastructure.events.local import LocalEvents

TABULAR = [
    onnx_models.linear_regressor(3),
    onnx_models.linear_regressor(3, flat=True),
    onnx_models.double_regressor(),
    onnx_models.multi_output_regressor(),
    onnx_models.binary_classifier(),
    onnx_models.label_only_classifier(),
    onnx_models.probabilities_only(),
    onnx_models.one_probability(),
    onnx_models.zipmap_classifier(),
    onnx_models.zipmap_classifier((3, 7)),
    onnx_models.column_model(),
    onnx_models.column_model(flat=True),
    onnx_models.mixed_width_model(),
    onnx_models.string_tensor_model(),
    onnx_models.bool_tensor_model(),
]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[bytes], Server]]:
    """A server in this process that answers with the model."""
    opened: list[Server] = []

    def serve(model: bytes) -> Server:
        server = Server(tmp_path / str(len(opened)))
        opened.append(server)
        server.serve(model)
        return server

    yield serve
    for server in opened:
        server.close()


def infer(server: Server, request: InferRequest) -> Inferred:
    async def ask() -> Inferred:
        return await server.infer(request, time.perf_counter())

    return asyncio.run(ask())


def events(server: Server) -> list[PredictionMade]:
    """What stands in the journal, as the log role reads it."""
    source = LocalEvents(server.settings.journal_folder)
    try:
        found = [event for event in source.read(10_000) if isinstance(event, RecordedEvent)]
    finally:
        source.close()
    return [one.event for one in found if isinstance(one.event, PredictionMade)]


def inputs_of(version: ModelVersion, count: int) -> dict[str, Tensor]:
    """Rows that any of the models can answer."""
    random = np.random.default_rng(5)
    inputs = {}
    for spec, width in zip(version.metadata.signature.inputs, version.metadata.signature.widths, strict=True):
        datatype = DATATYPE_OF[spec.type]
        shape = (count, width) if len(spec.shape) == 2 else (count,)
        if datatype == "BYTES":
            array = np.array(random.choice(["Oslo", "Lima"], shape), object)
        else:
            array = random.integers(0, 2, shape).astype(DTYPE_OF[datatype])
        inputs[spec.name] = Tensor(datatype, array)
    return inputs


@pytest.mark.parametrize("model", TABULAR, ids=range(len(TABULAR)))
def test_a_row_alone_is_answered_as_the_engine_would(serve: Callable[[bytes], Server], model: bytes) -> None:
    """One row goes by way of /predict and its outputs are made from its answer: bit for bit what the engine gives."""
    server = serve(model)
    served, _ = server.live.model("risk").pick(None, "")
    inputs = inputs_of(served.version, 1)
    form = form_of(served)
    assert isinstance(form, RowForm)
    expected, _ = served.engine.infer_rows(inputs, form.output_names, 1)
    answered = infer(server, InferRequest("risk", inputs))
    assert [name for name, _ in answered.outputs] == list(form.output_names)
    for (_, found), wanted in zip(answered.outputs, expected, strict=True):
        assert (found.datatype, found.array.dtype) == (wanted.datatype, wanted.array.dtype)
        assert found.array.shape == wanted.array.shape
        assert found.array.tolist() == wanted.array.tolist()


@pytest.mark.parametrize("model", TABULAR, ids=range(len(TABULAR)))
def test_rows_together_and_alone_leave_the_same_record(
    serve: Callable[[bytes], Server], model: bytes
) -> None:
    """What monitors and replays read must not depend on how rows came."""
    server = serve(model)
    served, _ = server.live.model("risk").pick(None, "")
    inputs = inputs_of(served.version, 6)
    together = infer(server, InferRequest("risk", inputs))
    for row in range(6):
        one = {name: Tensor(t.datatype, t.array[row : row + 1]) for name, t in inputs.items()}
        infer(server, InferRequest("risk", one))
    found = events(server)
    of_batch, of_singles = found[:6], found[6:]
    assert [event.id for event in of_batch] == together.prediction_ids()
    for batched, single in zip(of_batch, of_singles, strict=True):
        assert batched.inputs == single.inputs
        assert batched.result == single.result
        assert batched.probabilities == single.probabilities
        assert (batched.sources, batched.role, batched.strategy) == (
            single.sources,
            single.role,
            single.strategy,
        )


def test_tensors_go_on_record_once(serve: Callable[[bytes], Server]) -> None:
    """A request that is no rows is one prediction."""
    server = serve(onnx_models.three_dimensional_input())
    x = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    answered = infer(server, InferRequest("risk", {"x": Tensor("FP32", x)}, request_id="mine"))
    (event,) = events(server)
    assert (event.id, event.request_id, event.batch_size) == (answered.prediction_id, "mine", 1)
    ((name, output),) = answered.outputs
    assert event.result == {
        name: {
            "datatype": output.datatype,
            "shape": list(output.array.shape),
            "data": output.array.reshape(-1).tolist(),
        }
    }


def test_runs_that_were_short_move_to_the_loop(serve: Callable[[bytes], Server]) -> None:
    """How long a tensor takes is learnt from runs: a hop to a thread costs a hundred microseconds."""
    server = serve(onnx_models.three_dimensional_input())
    served, _ = server.live.model("risk").pick_any(None, "")
    assert not isinstance(served, ServedVersion)
    times_s = itertools.count(0, INLINE_LIMIT_S / 2)
    served._clock = lambda: next(times_s)
    x = Tensor("FP32", np.zeros((1, 4, 2), np.float32))
    for _ in range(2):
        infer(server, InferRequest("risk", {"x": x}))
    assert served._inline_bytes >= x.array.nbytes


def test_row_ids_sort_and_never_meet_others() -> None:
    """They are UUIDv7 like all others, in the order of the rows."""
    first = new_batch_id(5000)
    ids = batch_ids(first, 5000)
    following = batch_ids(new_batch_id(3), 3)
    assert ids[0] == first
    assert ids == sorted(ids)
    assert len({*ids, *following, *(new_id() for _ in range(5000))}) == 10_003
    assert {one[14] for one in ids} == {"7"}
    assert {one[19] for one in ids} <= set("89ab")


@given(st.integers(1, 70))
def test_a_batch_id_leads_to_as_many_ids_as_rows(count: int) -> None:
    """A reader makes them from the first one's alone."""
    ids = batch_ids(new_batch_id(count), count)
    assert len(set(ids)) == count


def made(count: int, width: int) -> PredictionsMade:
    """A batch as the use case records it, of rows of that many bytes."""
    return PredictionsMade(
        first_id=new_batch_id(count),
        model_id="risk",
        model_version="1.0.0",
        sha256="0" * 64,
        strategy=Strategy.SINGLE,
        role=Role.CHAMPION,
        probability=1.0,
        request_id="r",
        routing_key="k",
        inputs=bytes(range(256))[:width] * count,
        sources="r",
        results=list(range(count)),
        confidences=None,
        probabilities=None,
        latency_ms=0.5,
        created_at_ms=1,
    )


def test_batches_survive_segments_that_are_full(tmp_path: Path) -> None:
    """Each segment explains itself, so a batch that opens one must bring its schema."""
    schema = msgspec.msgpack.encode({"1.0.0": [Column("a", ElementType.FLOAT32)]})
    writer = JournalWriter(tmp_path / "api-0", segment_bytes=1200)
    batches = [made(count, 4) for count in (1, 64, 7, 64, 64, 2)]
    for batch in batches:
        writer.append_batch(msgspec.msgpack.encode(batch), len(batch.results), b"12345678", schema)
    writer.close()
    assert len(list((tmp_path / "api-0").iterdir())) > 1
    reader = JournalReader(tmp_path)
    records = reader.read(10_000)
    reader.close()
    assert {(record.damage, record.schema) for record in records} == {("", schema)}
    found = [msgspec.msgpack.decode(record.payload, type=PredictionMade) for record in records]
    assert found == [row for batch in batches for row in batch.rows()]


def test_a_batch_that_is_none_is_damage_and_stops_nothing(tmp_path: Path) -> None:
    """One bad record must not hide those behind it."""
    writer = JournalWriter(tmp_path / "api-0")
    writer.append_batch(b"\x91\xa3bad", 1, b"12345678", b"schema")
    writer.append_batch(msgspec.msgpack.encode(made(2, 4)), 2, b"12345678", b"schema")
    writer.close()
    reader = JournalReader(tmp_path)
    records = reader.read(100)
    reader.close()
    assert [bool(record.damage) for record in records] == [True, False, False]


def test_a_batch_that_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    """All rows are on record or none, and the answer is a 503."""
    writer = JournalWriter(tmp_path / "api-0", limit_bytes=4000)
    with pytest.raises(JournalFull):
        writer.append_batch(msgspec.msgpack.encode(made(500, 100)), 500, b"12345678", b"schema")
    dropped: list[int] = []
    DroppingJournal(writer, dropped.append).append_batch(
        msgspec.msgpack.encode(made(500, 100)), 500, b"12345678", b"schema"
    )
    writer.close()
    assert dropped == [500]
