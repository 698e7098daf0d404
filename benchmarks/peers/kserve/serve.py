"""KServe's Python server with a custom model. Arguments: port, ONNX file."""

import sys
from uuid import uuid4

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Onnx(Model):
    def __init__(self) -> None:
        super().__init__("bench")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(sys.argv[2], options)
        self.ready = True

    def predict(self, payload: InferRequest, headers: object = None) -> InferResponse:
        found = self._session.run(None, {"X": payload.inputs[0].as_numpy()})
        outputs = []
        for name, datatype, values in zip(("label", "probabilities"), ("INT64", "FP32"), found, strict=True):
            output = InferOutput(name, list(values.shape), datatype)
            output.set_data_from_numpy(values, binary_data=False)
            outputs.append(output)
        return InferResponse(payload.id or str(uuid4()), self.name, outputs)


if __name__ == "__main__":
    ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, access_log_format=None).start([Onnx()])
