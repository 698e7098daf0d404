"""What answers predictions in an API process, without the process."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx_models

from phoenix_ml.application.catalogue import Registration, register
from phoenix_ml.application.ports import Engines
from phoenix_ml.application.predict import Answer, Predict
from phoenix_ml.bootstrap import Phoenix, bootstrap, bootstrap_infer, bootstrap_predict, open_features
from phoenix_ml.domain.events import PredictionMade
from phoenix_ml.domain.models import Framework, Stage
from phoenix_ml.domain.predictions import PredictionRequest
from phoenix_ml.infrastructure.events.journal import JournalReader, JournalWriter
from phoenix_ml.infrastructure.telemetry.meter import MetricsMeter
from phoenix_ml.infrastructure.telemetry.metrics import MetricsWriter
from phoenix_ml.settings import fixed_settings


class Server:
    """Everything between HTTP and the disk; close it in the end."""

    def __init__(self, folder: Path, engines: Engines | None = None, **settings: Any) -> None:
        self.settings = fixed_settings(data=folder, **settings)
        phoenix = bootstrap(self.settings)
        self.phoenix: Phoenix = phoenix if engines is None else replace(phoenix, engines=engines)
        self.phoenix.database.upgrade()
        self.folder = folder
        self.metrics = MetricsWriter(folder / "metrics.mmap")
        self.journal = JournalWriter(
            self.settings.journal_folder / "api-0", limit_bytes=self.settings.journal_limit_bytes
        )
        self.features = open_features(self.settings)
        self.meter = MetricsMeter(self.metrics)
        self.live, self.predict = bootstrap_predict(self.phoenix, self.features, self.journal, self.meter)
        self.infer = bootstrap_infer(self.phoenix, self.live, self.predict, self.journal, self.meter)

    def serve(
        self, model: bytes, *, batches: bool | None = None, framework: Framework = Framework.ONNX
    ) -> None:
        """Registers and activates the model; ``batches`` overrules what the warm-up has measured."""
        phoenix = self.phoenix
        register(
            phoenix.registry,
            phoenix.artifacts,
            phoenix.engines,
            onnx_models.write(self.folder / "model.onnx", model),
            Registration("risk", "1.0.0", Stage.DEV, {}, None, framework),
            actor="test",
        )
        phoenix.registry.set_active("risk", "1.0.0", True, "test")
        self.live.refresh()
        if batches is not None:
            served, _ = self.live.model("risk").pick(None, "key")
            served.batches, served.batch_rows_limit = batches, 64 if batches else 1

    def ask(self, rows: Sequence[Sequence[Any]]) -> list[Answer | BaseException]:
        """The answers to requests that come at the same time."""

        async def ask() -> list[Answer | BaseException]:
            asked = [one(self.predict, row) for row in rows]
            return await asyncio.gather(*asked, return_exceptions=True)

        return asyncio.run(ask())

    def recorded(self) -> dict[str, PredictionMade]:
        """The journal's events by id."""
        reader = JournalReader(self.settings.journal_folder)
        events = [msgspec.msgpack.decode(r.payload, type=PredictionMade) for r in reader.read(10_000)]
        reader.close()
        return {event.id: event for event in events}

    def close(self) -> None:
        asyncio.run(self.features.close())
        self.journal.close()
        self.metrics.close()
        self.phoenix.close()


async def one(predict: Predict, row: Sequence[Any], started: float | None = None) -> Answer:
    request = PredictionRequest(model_id="risk", features=list(row))
    return await predict.one(request, asyncio.get_running_loop().time() if started is None else started)
