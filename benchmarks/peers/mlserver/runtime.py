"""What MLServer's documentation calls a custom runtime."""

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        row = NumpyCodec.decode_input(payload.inputs[0])
        label, probabilities = self._session.run(None, {"X": row})
        outputs = [NumpyCodec.encode_output("label", label)]
        outputs.append(NumpyCodec.encode_output("probabilities", probabilities))
        return InferenceResponse(model_name=self.name, outputs=outputs)
