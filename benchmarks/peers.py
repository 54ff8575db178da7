"""Peers: one function per library, that makes a layer ready in the library's best forms; cconv is one of them.

In: a Layer and a number of threads.  Out: Forms, each with a call to be timed. A library is imported only inside its
own function, for every one runs in a process of its own.

Best forms: weights packed ahead and outputs bound where the library can; all threads its own setting knows of; float32
in float32. A form may have several variants, of which the report counts the fastest.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from workloads import Layer


class Form(NamedTuple):
    """A layer ready to run."""

    name: str  # one column of the report
    variant: str
    run: Callable[[], object]
    #: What `run` returns, as an (N, K, P, Q) array.
    array: Callable[[object], np.ndarray] = np.asarray
    #: Whose memory the result is in: "fresh" from the library's allocator, which may recycle it, or "bound" once.
    outputs: str = "fresh"
    #: Order of the input and the output. "blocked": an order of the library's own, which no array has.
    layout: str = "NCHW"
    #: What cconv's plan says of itself.
    plan: str | None = None
    executed_flops: int | None = None


class Unsupported(Exception):
    """The library has no such convolution; the text says why."""


# ---------------------------------------------------------------------------------------------------------- cconv


def _conv2d(layer: Layer, **more) -> Form:
    """A `Conv2d`, with what its plan says."""
    import cconv
    from cconv import backend
    from cconv.planning import batch_class, plan, specs

    x, weight, bias = layer.arrays()
    ready = cconv.Conv2d(weight, bias, **layer.options, **more)
    spec = specs.conv(layer.x[1:], layer.weight, bias=True, dtype=layer.dtype, **layer.options, **more)
    chosen = plan.single(spec, backend.get("cpu").machine(), images=batch_class(len(x)))
    tiling = chosen.steps[0].tiling
    text = getattr(tiling, "label", None) or getattr(tiling, "algorithm", "")
    return Form("cconv", "Conv2d", lambda: ready(x), plan=str(text), executed_flops=layer.x[0] * chosen.executed_flops)


def cconv(layer: Layer, threads: int) -> list[Form]:
    import cconv

    cconv.set_num_threads(threads)
    x, weight, bias = layer.arrays()
    forms = [_conv2d(layer)]
    if layer.dtype == "float32":
        forms.append(_conv2d(layer, precision="high")._replace(name="cconv high"))
    options = layer.options
    forms.append(Form("cconv conv2d", "conv2d", lambda: cconv.conv2d(x, weight, bias, **options)))
    return forms


def direct(layer: Layer, threads: int) -> list[Form]:
    """cconv, computed directly whatever it would choose."""
    import cconv

    cconv.set_num_threads(threads)
    return [_conv2d(layer, algorithm="direct")]


def reference(layer: Layer, threads: int) -> list[Form]:
    """What is right: cconv's float64 twin."""
    from cconv import backend
    from cconv.planning import plan, specs
    from cconv.weights import Weights

    x, weight, bias = layer.arrays()
    twin = backend.get("reference")
    spec = specs.conv(layer.x[1:], layer.weight, bias=True, dtype=layer.dtype, **layer.options)
    program = twin.build(plan.single(spec, twin.machine()), Weights(lambda _: (weight, bias)))
    return [Form("reference", "float64", lambda: program.run([x])[0])]


# ------------------------------------------------------------------------------------------------------- the peers


def torch(layer: Layer, threads: int) -> list[Form]:
    """The module in both layouts, each also with the weights that oneDNN reordered ahead; and the function."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    x, weight, bias = map(torch.from_numpy, layer.arrays())
    options = layer.options
    geometry = [layer.padding] * 2, [layer.stride] * 2, [layer.dilation] * 2, layer.groups

    def forms(name: str, layout: str, x, weight) -> list[Form]:
        module = torch.nn.Conv2d(layer.x[1], layer.weight[0], layer.weight[2:], **options, dtype=x.dtype).eval()
        module.weight.data, module.bias.data = weight, bias
        found = [Form(name, "nn.Conv2d", lambda: module(x), layout=layout)]
        if layer.dtype == "float32":  # what torch.compile makes of a frozen module
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
            call = torch.ops.mkldnn._convolution_pointwise
            fixed = packed, bias, *geometry, "none", [], ""
            found.append(Form(name, "weights reordered", lambda: call(x, *fixed), layout=layout))
        return found

    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    return [
        *forms("torch", "NCHW", x, weight),
        *forms("torch channels_last", "NHWC", *last),
        Form("torch functional", "F.conv2d", lambda: torch.nn.functional.conv2d(x, weight, bias, **options)),
    ]


def _onnx(layer: Layer) -> tuple[np.ndarray, bytes]:
    """x, and a model of one node."""
    from onnx import TensorProto, helper, numpy_helper

    x, weight, bias = layer.arrays()
    node = helper.make_node(
        "Conv", ["x", "weight", "bias"], ["y"], group=layer.groups, strides=[layer.stride] * 2,
        pads=[layer.padding] * 4, dilations=[layer.dilation] * 2,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, layer.x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, layer.output)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return x, model.SerializeToString()


def onnxruntime(layer: Layer, threads: int) -> list[Form]:
    """Input and output bound; its threads may spin between two calls, or sleep."""
    import onnxruntime

    if layer.dtype != "float32":
        raise Unsupported(f"its CPU provider has no Conv for {layer.dtype}")
    x, model = _onnx(layer)

    def form(variant: str, spinning: str) -> Form:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        y = np.empty(layer.output, layer.dtype)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, x.dtype, x.shape, x.ctypes.data)
        binding.bind_output("y", "cpu", 0, y.dtype, y.shape, y.ctypes.data)

        def run() -> np.ndarray:
            session.run_with_iobinding(binding)
            return y

        run.input = x  # the binding has only its address
        return Form("onnxruntime", variant, run, outputs="bound")

    return [form("spinning", "1"), form("not spinning", "0")]


def openvino(layer: Layer, threads: int) -> list[Form]:
    """One infer request, its tensors in our memory; NCHW outside as inside the model, or NHWC outside."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    if layer.dtype != "float32":
        raise Unsupported(f"it computes {layer.dtype} in float32")
    x, serialized = _onnx(layer)
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }  # fmt: skip

    def form(name: str, layout: str, axes: tuple[int, ...]) -> Form:
        core = openvino.Core()
        model = core.read_model(model=serialized)
        steps = PrePostProcessor(model)
        for side in (steps.input(), steps.output()):
            side.model().set_layout(openvino.Layout("NCHW"))
            side.tensor().set_layout(openvino.Layout(layout))
        request = core.compile_model(steps.build(), "CPU", settings).create_infer_request()
        source = np.ascontiguousarray(x.transpose(axes))
        y = np.empty([layer.output[axis] for axis in axes], layer.dtype)
        request.set_input_tensor(openvino.Tensor(source, shared_memory=True))
        request.set_output_tensor(openvino.Tensor(y, shared_memory=True))

        def run() -> np.ndarray:
            request.infer()
            return y

        run.input = source  # the request has only its address
        back = tuple(np.argsort(axes))
        return Form(name, layout, run, lambda y: y.transpose(back), outputs="bound", layout=layout)

    return [form("openvino", "NCHW", (0, 1, 2, 3)), form("openvino NHWC", "NHWC", (0, 2, 3, 1))]


@cache
def _ncnn_allocators() -> tuple:
    """Pools, so that blobs and scratch are recycled; they outlive every net and blob."""
    import ncnn

    return ncnn.UnlockedPoolAllocator(), ncnn.PoolAllocator()


def _ncnn_net(layer: Layer, threads: int):
    """A net of one layer: float32 throughout, Winograd on."""
    import ncnn

    _, weight, bias = layer.arrays()
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.blob_allocator, net.opt.workspace_allocator = _ncnn_allocators()
    for name in dir(net.opt):
        if name.startswith(("use_fp16", "use_bf16", "use_int8")):
            setattr(net.opt, name, False)
        if name.startswith("use_winograd"):
            setattr(net.opt, name, True)
    outputs, _, rows, columns = layer.weight
    settings = {
        0: outputs, 1: columns, 11: rows, 2: layer.dilation, 3: layer.stride, 4: layer.padding, 5: 1, 6: weight.size,
    }  # fmt: skip
    kind = "Convolution"
    if layer.groups > 1:
        kind, settings[7] = "ConvolutionDepthWise", layer.groups
    text = " ".join(f"{key}={value}" for key, value in settings.items())
    with tempfile.TemporaryDirectory() as folder:
        graph, binary = Path(folder) / "layer.param", Path(folder) / "layer.bin"
        graph.write_text(f"7767517\n2 2\nInput x 0 1 x\n{kind} conv 1 1 x y {text}\n")
        binary.write_bytes(bytes(4) + weight.tobytes() + bias.tobytes())  # four zeros: the weights are plain float32
        if net.load_param(str(graph)) or net.load_model(str(binary)):
            raise Unsupported("it refused the layer")
    return net


def ncnn(layer: Layer, threads: int) -> list[Form]:
    """One image after the other, or, as recent versions can, the batch at once; and in blocks of channels."""
    import ncnn

    if layer.dtype != "float32":
        raise Unsupported(f"it has no {layer.dtype}")
    x, *_ = layer.arrays()
    net = _ncnn_net(layer, threads)
    images = [ncnn.Mat(image).clone() for image in x]

    def repacked(mats, lanes: int):
        packed = [ncnn.Mat() for _ in mats]
        for mat, target in zip(mats, packed, strict=True):
            ncnn.convert_packing(mat, target, lanes)
        return packed

    def planar(image):
        extractor = net.create_extractor()
        extractor.input("x", image)
        return extractor.extract("y")[1]

    def in_blocks(image):
        extractor, y = net.create_extractor(), ncnn.Mat()
        extractor.input("x", image)
        extractor.extract("y", y, 1)  # 1: as it lies
        return y

    def stacked(mats) -> np.ndarray:
        return np.stack([np.array(mat) for mat in mats])

    blocks = repacked(images, next(lanes for lanes in (16, 8, 4, 1) if layer.x[1] % lanes == 0))
    forms = [
        Form("ncnn", "loop", lambda: [planar(image) for image in images], stacked),
        Form(
            "ncnn blocked", "loop", lambda: [in_blocks(block) for block in blocks],
            lambda mats: stacked(repacked(mats, 1)), layout="blocked",
        ),
    ]  # fmt: skip
    if len(images) > 1:
        whole = ncnn.Mat(x, 0).clone()
        apart = range(len(images))
        forms.append(Form("ncnn", "batch", lambda: planar(whole), lambda mat: stacked([mat.batch(i) for i in apart])))
    return forms


#: Library -> its forms.
LIBRARIES: dict[str, Callable[[Layer, int], list[Form]]] = {
    "cconv": cconv, "direct": direct, "reference": reference, "torch": torch, "onnxruntime": onnxruntime,
    "openvino": openvino, "ncnn": ncnn,
}  # fmt: skip
PEERS = ("torch", "onnxruntime", "openvino", "ncnn")


def version(library: str) -> dict | str:
    """What runs in this process."""
    if library in PEERS:
        return metadata.version(library)
    import cconv

    return cconv.show_config()
