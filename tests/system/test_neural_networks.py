"""Trained networks for pictures, sound and text, served: their answers are ONNX Runtime's, and they make sense."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import neural_networks
import numpy as np
import onnxruntime as ort
import pytest
from neural_networks import Network
from phoenix_server import PhoenixServer
from servers import free_port
from wire import Tensors, infer_call, over_grpc, over_rest

from phoenix_ml.domain.tensors import DTYPE_OF, Tensor, decode_raw, encode_raw

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

NETWORKS: list[Callable[[], Network]] = [
    neural_networks.vision,
    neural_networks.vision_detection,
    neural_networks.audio,
    neural_networks.text,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PhoenixServer]:
    phoenix = PhoenixServer(tmp_path_factory.mktemp("networks"), grpc_port=free_port())
    for make in NETWORKS:
        network = make()
        phoenix.register(network.path, network.name, "1.0.0")
    with phoenix:
        yield phoenix


def as_tensors(arrays: dict[str, neural_networks.Array]) -> Tensors:
    names = {dtype: datatype for datatype, dtype in DTYPE_OF.items() if datatype != "BF16"}
    return {
        name: (names[array.dtype], array.shape, encode_raw(Tensor(names[array.dtype], array)))
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: str(make.__name__))
def test_a_network_answers_as_onnx_runtime_does(server: PhoenixServer, make: Callable[[], Network]) -> None:
    """Dynamic dimensions, several inputs, a scalar among them, and answers of half a megabyte: bit for bit."""
    network = make()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(network.path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    with httpx.Client(base_url=server.url, timeout=60) as client, infer_call(server) as call:
        for request in network.requests:
            expected = as_tensors(dict(zip(names, session.run(names, request), strict=True)))
            assert over_rest(client, network.name, as_tensors(request)) == expected
            assert over_grpc(call, network.name, as_tensors(request)) == expected


def test_the_reader_reads_what_was_drawn(server: PhoenixServer) -> None:
    """The whole way, from pixels to letters."""
    network = neural_networks.vision(("1984",))
    with httpx.Client(base_url=server.url, timeout=60) as client:
        outputs = over_rest(client, network.name, as_tensors(network.requests[0]))
    ((name, output),) = outputs.items()
    answer = decode_raw(name, *output)
    assert neural_networks.read(answer, network) == ["1984"]
    assert np.allclose(answer.sum(axis=-1), 1, atol=1e-3)
