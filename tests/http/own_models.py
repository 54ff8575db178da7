"""Own models: files that onnx and safetensors write, and requests for what a service makes of them.

In: paths; a client.  Out: files; answers, maps and bills as the library's own can be compared with them.
"""

import json

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper


def network(path, filters=8, *, batch="N", more=(), outputs=(("features", 2),), **metadata):
    """A file with two branches, which join: conv -> relu -> + -> pool -> features; its image is called `data`."""
    rng = np.random.default_rng(filters)
    weights = {
        "w": rng.standard_normal((filters, 3, 3, 3), np.float32),
        "v": rng.standard_normal((filters, filters, 1, 1), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["data", "w"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Conv", ["relu", "v"], ["branch"]),
        helper.make_node("Add", ["relu", "branch"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["features"]),
        *more,
    ]
    graph = helper.make_graph(
        nodes,
        "two branches",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [batch, 3, "H", "W"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["A", "B", "P", "Q"][:rank]) for name, rank in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return save(graph, path, **metadata)


def save(graph, path, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def described(path, **metadata):
    """A safetensors file with a convolution of 4x4 pictures and more in its metadata."""
    graph = {
        "input_shape": [3, 4, 4],
        "nodes": [{"name": "conv", "operator": "Conv", "inputs": ["input", "w"]}],
        "outputs": ["conv"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = np.random.default_rng(3).standard_normal((2, 3, 1, 1), np.float32)
    safetensors.numpy.save_file({"w": weight}, path, {"graph": json.dumps(graph), **metadata})
    return path


def index(client) -> dict[tuple[str, str], dict]:
    return {(one["name"], one["version"]): one for one in client.post("/v2/repository/index").json}


def infer(client, name, x, version=None, outputs=None, image="data"):
    tensor = {"name": image, "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    more = {} if outputs is None else {"outputs": [{"name": output} for output in outputs]}
    path = name if version is None else f"{name}/versions/{version}"
    return client.post(f"/v2/models/{path}/infer", json={"inputs": [tensor], **more})


def maps_of(answer) -> dict[str, np.ndarray]:
    assert answer.status_code == 200, answer.data
    return {o["name"]: np.array(o["data"], np.float32).reshape(o["shape"]) for o in answer.json["outputs"]}


def bill_of(parameters) -> tuple[int, ...]:
    return tuple(int(parameters[key]) for key in ("macs", "flops", "flops_other"))
