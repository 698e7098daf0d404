"""The models of the ONNX standard's own test-suite, served: what comes back is what ONNX Runtime gives, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import onnxruntime as ort
import pytest
from onnx_suite import Case, cases, onnxruntime_answer
from phoenix_server import PhoenixServer
from servers import free_port
from wire import Tensors, infer_call, over_grpc, over_rest

from phoenix_ml.application.catalogue import Registration, register
from phoenix_ml.bootstrap import bootstrap
from phoenix_ml.domain.errors import ModelRefused
from phoenix_ml.domain.tensors import Tensor, encode_raw

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

VERSION = "1.0.0"
# The last: a tabular model that ONNX Runtime itself cannot run on a row of nothing.
CANNOT_RUN = ("ONNX Runtime cannot load the model", "draws from a generator", "--task tensors")


class Suite(NamedTuple):
    """A server that has every model of the suite that it takes, and why it does not take the others."""

    server: PhoenixServer
    served: dict[str, Case]
    refused: dict[str, tuple[Case, str]]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    server = PhoenixServer(tmp_path_factory.mktemp("suite"), grpc_port=free_port())
    served: dict[str, Case] = {}
    refused: dict[str, tuple[Case, str]] = {}
    phoenix = bootstrap(server.settings)
    phoenix.database.upgrade()
    for number, case in enumerate(cases()):
        # Names of the suite are longer than a model's may be.
        model_id = f"case-{number}"
        try:
            register(
                phoenix.registry,
                phoenix.artifacts,
                phoenix.engines,
                case.path,
                Registration(model_id, VERSION),
                actor="test",
            )
        except ModelRefused as exc:
            refused[model_id] = case, exc.message
        else:
            phoenix.registry.set_active(model_id, VERSION, True, "test")
            served[model_id] = case
    phoenix.close()
    with server:
        yield Suite(server, served, refused)


def as_tensors(case: Case, values: dict[str, Any]) -> Tensors:
    """Values of the suite as the protocol carries them."""
    tensors = {}
    for name, value in values.items():
        datatype = case.types[name]
        assert datatype is not None
        array = np.asarray(value)
        if datatype == "BYTES":
            texts = [x.decode() if isinstance(x, bytes) else x for x in array.reshape(-1)]
            array = np.array(texts, object).reshape(array.shape)
        elif datatype == "BF16":
            array = array.view(np.uint16)
        tensors[name] = (datatype, array.shape, encode_raw(Tensor(datatype, array)))
    return tensors


def locally(case: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # As a server has it: with two threads sums are added up in another order.
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(case.path), options, providers=["CPUExecutionProvider"])
    return onnxruntime_answer(session, inputs)


def test_every_case_answers_as_onnx_runtime_does(suite: Suite) -> None:
    """Over REST and over gRPC, every data set of every model whose types the protocol can carry."""
    wrong: list[str] = []
    unable: list[str] = []
    answered = 0
    with httpx.Client(base_url=suite.server.url, timeout=60) as client, infer_call(suite.server) as call:
        for model_id, case in suite.served.items():
            for data in case.data_sets():
                inputs = as_tensors(case, data.inputs)
                try:
                    expected = locally(case, data.inputs)
                except Exception as exc:  # noqa: BLE001 - ONNX Runtime cannot run it, so nor can we
                    unable.append(f"{case}: {exc}")
                    continue
                tensors = as_tensors(case, expected)
                try:
                    found = over_rest(client, model_id, inputs), over_grpc(call, model_id, inputs)
                except (AssertionError, grpc.RpcError) as exc:
                    wrong.append(f"{case}: {exc}"[:300])
                    continue
                answered += 1
                if found != (tensors, tensors):
                    wrong.append(f"{case}: another answer")
    assert wrong == [], "\n".join(wrong)
    assert answered > 1500
    assert len(unable) < 10, "\n".join(unable)


def test_what_is_not_served_is_refused_with_its_reason(suite: Suite) -> None:
    """Sequences, optional values, types that the protocol lacks, and what ONNX Runtime cannot load; nothing else."""
    unexplained = []
    for case, words in suite.refused.values():
        if case.is_carried:
            known: tuple[str, ...] = CANNOT_RUN
        else:
            known = (
                "is a sequence",
                "is optional",
                "which is none of BOOL",
                *CANNOT_RUN,
            )
        if not any(part in words for part in known):
            unexplained.append(f"{case}: {words}")
    assert unexplained == []
    assert all(case.is_carried for case in suite.served.values())


def test_the_suite_is_there() -> None:
    """A folder that was empty would make every other test of this module pass."""
    assert len(list(cases("node"))) > 1500
    assert all(Path(case.path).exists() for case in cases())
