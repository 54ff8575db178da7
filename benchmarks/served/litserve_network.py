"""Litserve_network: the network of NETWORK under LitServe, ONNX Runtime behind it.

In: PORT, WORKERS, THREADS, NETWORK; JSON with pixels as base64, which is quicker than lists of numbers.  Out: scores.
"""

import base64
import os

import litserve
import numpy as np
import onnxruntime


class Network(litserve.LitAPI):
    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        self._session = onnxruntime.InferenceSession(os.environ["NETWORK"], options, ["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def decode_request(self, request):
        pixels = np.frombuffer(base64.b64decode(request["data"]), np.uint8).reshape(request["shape"])
        return np.divide(pixels, 255, dtype=np.float32)

    def predict(self, x):
        return self._session.run(None, {self._input: x})[0]

    def encode_response(self, y):
        return {"shape": y.shape, "data": base64.b64encode(y).decode()}


if __name__ == "__main__":
    server = litserve.LitServer(Network(), accelerator="cpu", workers_per_device=int(os.environ["WORKERS"]))
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="error")
