"""Mlserver_network: the network of NETWORK under MLServer, ONNX Runtime behind it.

In: THREADS, NETWORK; the Open Inference Protocol, pixels as base64 in a BYTES tensor: MLServer's HTTP takes no binary
tensors, and lists of numbers are slower.  Out: scores, alike.
"""

import os

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import Base64Codec
from mlserver.types import InferenceRequest, InferenceResponse

SHAPE = (1, 3, 224, 224)


class Network(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        self._session = onnxruntime.InferenceSession(os.environ["NETWORK"], options, ["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (data,) = Base64Codec.decode_input(payload.inputs[0])
        x = np.divide(np.frombuffer(data, np.uint8).reshape(SHAPE), 255, dtype=np.float32)
        y = self._session.run(None, {self._input: x})[0]
        return InferenceResponse(model_name=self.name, outputs=[Base64Codec.encode_output("scores", [y.tobytes()])])
