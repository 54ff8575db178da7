"""The ONNX package's own backend suite, against cconv.load: a peer's tests, not ours.

In: every case of the suite whose graph is made of operators that are claimed.  Out: the suite's own verdict on what
`Model.run` gives for the file's outputs. EXCLUDED says, by pattern, which cases are left out all the same, and why.

The suite hands most operands over as inputs. A model has one image: the first float32 input. The others become
initializers, as networks have them; and where an operator takes several tensors, a second run packs them all into one
image that the graph itself cuts apart again.
"""

import re
import warnings

import numpy as np
import pytest

import cconv
from cconv.model import folding, layers

onnx = pytest.importorskip("onnx")
with warnings.catch_warnings():
    # Making the whole suite's data overflows a few casts of operators that are not ours.
    warnings.simplefilter("ignore")
    import onnx.backend.base
    import onnx.backend.test
    from onnx.backend.test.loader import load_model_tests

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
CLAIMED = {*layers.OPERATORS, "Constant", "ConstantOfShape", *folding.OF_SHAPES} - {"AdaptiveAveragePool", "Cast"}
#: What is folded if no image changes it may help, but is not claimed by itself.
KNOWN = CLAIMED | set(folding.FOLD)
#: Operators whose operands may all depend on the image.
SEVERAL_TENSORS = {"Add", "Sub", "Mul", "Div", "Sum", "Concat", "MatMul"}
KINDS = ("node", "simple", "real", "pytorch-converted", "pytorch-operator")

#: pattern -> reason.
EXCLUDED = {
    r"^test_training_dropout|^test_batchnorm_.*training_mode": "training is not inference",
    r"^test_(averagepool|maxpool|convtranspose)_3d|^test_(AvgPool|Conv|MaxPool)3d": "volumes are no images",
    r"^test_reshape_allowzero_reordered$|^test_slice_start_out_of_bounds$|_zero_size_": "maps have elements",
    r"^test_rotary_embedding.*_expanded$": "its Split has a part without elements",
    r"^test_maxpool_with_argmax": "places of maxima are int64",
    r"^test_matmul_1d_1d$": "a result without axes is a row of as many numbers as runs",
    r"^test_resize_.*(cubic|antialias|tf_crop)": "nearest and linear alone are claimed",
    r"^test_(rms|group)_normalization_.*_expanded|^test_mvn_expanded": "Pow and Sqrt of maps are not claimed",
    r"^test_flexattention_": "Expand of maps is not claimed",
    r"^test_causal_conv_with_state_.*past_state_expanded$|_decode_step_expanded$": "state is a second input",
    r"^test_Softmin$|^test_operator_(params|basic|symbolic_override_nested)$": "Neg of maps is not claimed",
}


def _is_ours(case) -> bool:
    """Whether a case has a float32 image and only operators that are known, one of them claimed."""
    graph = (case.model or onnx.load(_file_of(case))).graph
    operators = {f"{node.domain}.{node.op_type}".removeprefix("ai.onnx").strip(".") for node in graph.node}
    fixed = {tensor.name for tensor in graph.initializer}
    images = [i for i in graph.input if i.name not in fixed and i.type.tensor_type.elem_type == FLOAT]
    kinds = {o.type.tensor_type.elem_type for o in graph.output} <= {FLOAT, INT64}
    return bool(images) and kinds and operators <= KNOWN and bool(operators & CLAIMED)


def _file_of(case) -> str:
    root = onnx.__path__[0]
    return f"{case.model_dir}/model.onnx" if case.model_dir else f"{root}/{case.url.removeprefix('onnx/')}"


def _inputs_as_initializers(model, values: dict[str, np.ndarray], image: str):
    """The graph with one input, and its other inputs as constants."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for name, value in values.items():
        if name != image:
            made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return made


def _packed(model, values: dict[str, np.ndarray]):
    """The graph on one row of numbers, which it cuts into its inputs."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.ir_version = max(made.ir_version, 4)  # whose initializers need not be inputs as well
    graph, helper = made.graph, onnx.helper
    for value in [value for value in graph.input if value.name in values]:
        graph.input.remove(value)
    sizes = [value.size for value in values.values()]
    graph.input.append(helper.make_tensor_value_info("packed", FLOAT, [1, sum(sizes)]))
    rows = [f"{name}_row" for name in values]
    if _opset(model) < 13:
        nodes = [helper.make_node("Split", ["packed"], rows, axis=1, split=sizes)]
    else:
        graph.initializer.append(helper.make_tensor("packed_sizes", INT64, [len(sizes)], sizes))
        nodes = [helper.make_node("Split", ["packed", "packed_sizes"], rows, axis=1)]
    for name, value in values.items():
        graph.initializer.append(helper.make_tensor(f"{name}_shape", INT64, [value.ndim], value.shape))
        nodes.append(helper.make_node("Reshape", [f"{name}_row", f"{name}_shape"], [name]))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    return made, np.concatenate([value.ravel() for value in values.values()])[None]


class _Prepared(onnx.backend.base.BackendRep):
    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    def _run(self, model, x):
        path = self.folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        names = [output.name for output in model.graph.output]
        results = cconv.load(path).run(x, names)
        return [results[name] for name in names]

    def run(self, inputs, **_):
        graph = self.model.graph
        fixed = {tensor.name for tensor in graph.initializer}
        values = dict(zip((i.name for i in graph.input if i.name not in fixed), inputs, strict=True))
        floats = {name: value for name, value in values.items() if value.dtype == np.float32 and value.ndim}
        image = next(iter(floats))
        operators, results = {node.op_type for node in graph.node}, []
        several = 1 < len(floats) == len(values) and operators <= SEVERAL_TENSORS
        if not (several and "Concat" in operators):
            results.append(self._run(_inputs_as_initializers(self.model, values, image), values[image]))
        if several:
            results.append(self._run(*_packed(self.model, floats)))
        for one, other in zip(results[0], results[-1], strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
        return results[0]


def _opset(model) -> int:
    return next(one.version for one in model.opset_import if one.domain == "")


class _Backend(onnx.backend.base.Backend):
    folder = None

    @classmethod
    def prepare(cls, model, device="CPU", **_):
        return _Prepared(model, cls.folder)

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"


def _names() -> list[str]:
    found = []
    for kind in KINDS:
        for case in load_model_tests(kind=kind):
            if case.model is not None or case.model_dir or (case.url or "").startswith("onnx/"):
                found += [case.name] if _is_ours(case) else []
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NAMES = _names()
    SUITE = {
        name.removesuffix("_cpu"): case
        for group in onnx.backend.test.BackendTest(_Backend, __name__).test_cases.values()
        for name, case in vars(group).items()
        if name.endswith("_cpu")
    }
LEFT_OUT = {name for name in NAMES if any(re.search(pattern, name) for pattern in EXCLUDED)}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LEFT_OUT])
def test_a_case_of_the_onnx_suite(name, tmp_path, monkeypatch):
    monkeypatch.setattr(_Backend, "folder", tmp_path)
    monkeypatch.setenv("ONNX_MODELS", str(tmp_path / "models"))
    SUITE[name](None)


def test_every_exclusion_leaves_something_out():
    for pattern in EXCLUDED:
        assert any(re.search(pattern, name) for name in NAMES), pattern


def test_the_suite_is_not_empty():
    """A change of its names or of our table must not pass unseen."""
    run = [name for name in NAMES if name not in LEFT_OUT]
    light = {"bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet"}
    assert {f"test_{name}" for name in (*light, "vgg19", "zfnet512")} <= set(run)
    assert len(run) >= 330
    assert len(LEFT_OUT) < len(run) / 3
