"""The usual service around a model: FastAPI, pydantic, redis-py, ONNX Runtime in a thread, aiokafka, prometheus.

Arguments: port, ONNX file, Redis URL, and, where events are to be sent, HOST:PORT of Kafka and a topic. Written
as one finds it in tutorials, with what costs it nothing and helps: uvloop and httptools, hiredis, one thread a
session (the default's threads spin), no access log.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import numpy as np
import onnxruntime
import redis.asyncio
import uvicorn
from aiokafka import AIOKafkaProducer
from fastapi import FastAPI, HTTPException, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from pydantic import BaseModel

PORT, ARTIFACT, REDIS = int(sys.argv[1]), sys.argv[2], sys.argv[3]
KAFKA, TOPIC = sys.argv[4:6] if sys.argv[4:] else (None, "")

PREDICTIONS = Counter("predictions_total", "Predictions.", ["model", "version"])
SECONDS = Histogram("prediction_seconds", "Time of a prediction.", ["model", "version"])

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(ARTIFACT, options, providers=["CPUExecutionProvider"])
INPUT = session.get_inputs()[0]
NAMES = [f"{INPUT.name}_{n}" for n in range(INPUT.shape[1])]
store = redis.asyncio.Redis.from_url(REDIS, decode_responses=True)
producer: AIOKafkaProducer | None = None


class PredictionRequest(BaseModel):
    model_id: str
    entity_id: str | None = None
    features: list[float] | None = None


class PredictionResponse(BaseModel):
    prediction_id: str
    model_id: str
    model_version: str
    result: int
    confidence: float
    probabilities: list[float]
    latency_ms: float


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    global producer  # noqa: PLW0603 - as the usual service has it
    if KAFKA is not None:
        producer = AIOKafkaProducer(bootstrap_servers=KAFKA, enable_idempotence=True)
        await producer.start()
    yield
    if producer is not None:
        await producer.stop()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/metrics")
async def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@app.post("/predict")
async def predict(request: PredictionRequest) -> PredictionResponse:
    started = time.perf_counter()
    if request.features is not None:
        values = request.features
    else:
        stored = await store.hmget(f"features:{request.entity_id}", NAMES)
        if None in stored:
            raise HTTPException(404, "unknown entity")
        values = [float(value) for value in stored]
    row = np.asarray([values], dtype=np.float32)
    labels, probabilities = await asyncio.to_thread(session.run, None, {INPUT.name: row})
    shares = probabilities[0].tolist()
    answer = PredictionResponse(
        prediction_id=str(uuid4()),
        model_id=request.model_id,
        model_version="1.0.0",
        result=int(labels[0]),
        confidence=max(shares),
        probabilities=shares,
        latency_ms=(time.perf_counter() - started) * 1000,
    )
    if producer is not None:
        event = answer.model_dump() | {"features": values, "entity_id": request.entity_id}
        await producer.send(TOPIC, json.dumps(event).encode(), key=answer.prediction_id.encode())
    PREDICTIONS.labels(request.model_id, "1.0.0").inc()
    SECONDS.labels(request.model_id, "1.0.0").observe(time.perf_counter() - started)
    return answer


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, http="httptools", loop="uvloop", log_level="warning", access_log=False)
