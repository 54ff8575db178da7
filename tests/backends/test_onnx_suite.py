"""The ONNX package's own backend suite: its cases for 2-D Conv and pools, against the public operators.

A peer's tests, not ours: INCLUDED says which cases, EXCLUDED which of those have no operator here, and why.
"""

import warnings

import pytest

import cconv
from cconv.planning import shapes

onnx = pytest.importorskip("onnx")
with warnings.catch_warnings():
    # Making the whole suite's data overflows a few casts of operators that are not ours.
    warnings.simplefilter("ignore")
    import onnx.backend.base
    import onnx.backend.test

INCLUDED = (
    r"^test_(basic_conv|conv_with)_.*_cpu$",
    r"^test_(max|average)pool_(with_argmax_)?2d_.*_cpu$",
    r"^test_global(average|max)pool.*_cpu$",
    r"^test_(Conv|AvgPool|MaxPool)2d.*_cpu$",
    r"^test_operator_conv_cpu$",
)
#: pattern -> reason.
EXCLUDED = {
    r"^test_maxpool_2d_uint8_": "integers are refused, never converted silently",
    r"^test_maxpool_with_argmax_2d_": "max_pool2d gives the maxima, not their places",
}


def _padding(attributes, x, kernel, strides, dilations):
    """(top, left, bottom, right) from ONNX's pads or auto_pad."""
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode == "NOTSET":
        return tuple(attributes.get("pads", (0, 0, 0, 0)))
    if mode == "VALID":
        return "valid"
    top, left, bottom, right = shapes.padding("same", x.shape[2:], kernel, strides, dilations)
    return (top, left, bottom, right) if mode == "SAME_UPPER" else (bottom, right, top, left)


def _conv(x, weight, bias=None, **a):
    strides, dilations = tuple(a.get("strides", (1, 1))), tuple(a.get("dilations", (1, 1)))
    padding = _padding(a, x, weight.shape[2:], strides, dilations)
    return cconv.conv2d(x, weight, bias, strides, padding, dilations, a.get("group", 1))


def _pool(operator):
    def run(x, **a):
        kernel, strides, dilations = (tuple(a.get(k, (1, 1))) for k in ("kernel_shape", "strides", "dilations"))
        padding = _padding(a, x, kernel, strides, dilations)
        more = {"count_include_pad": bool(a.get("count_include_pad", 0))} if operator is cconv.avg_pool2d else {}
        ceil_mode = bool(a.get("ceil_mode", 0))
        return operator(x, kernel, strides, padding, dilation=dilations, ceil_mode=ceil_mode, **more)

    return run


OPERATORS = {
    "Conv": _conv,
    "MaxPool": _pool(cconv.max_pool2d),
    "AveragePool": _pool(cconv.avg_pool2d),
    "GlobalAveragePool": cconv.global_avg_pool2d,
    "GlobalMaxPool": cconv.global_max_pool2d,
}


class _Prepared(onnx.backend.base.BackendRep):
    def __init__(self, graph):
        self.graph = graph

    def run(self, inputs, **_):
        values = {t.name: onnx.numpy_helper.to_array(t) for t in self.graph.initializer}
        free = [i.name for i in self.graph.input if i.name not in values]
        values.update(zip(free, inputs, strict=True))
        for node in self.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            (name,) = node.output
            values[name] = OPERATORS[node.op_type](*(values[i] for i in node.input if i), **attributes)
        return [values[o.name] for o in self.graph.output]


class _Backend(onnx.backend.base.Backend):
    @classmethod
    def prepare(cls, model, device="CPU", **_):
        return _Prepared(model.graph)

    @classmethod
    def supports_device(cls, device):
        return device == "CPU"


def _cases():
    """name -> test function of every case that is included and not excluded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        suite = onnx.backend.test.BackendTest(_Backend, __name__)
    for pattern in INCLUDED:
        suite.include(pattern)
    for pattern in EXCLUDED:
        suite.exclude(pattern)
    return {
        name: case
        for group in suite.test_cases.values()
        for name, case in vars(group).items()
        if name.startswith("test_") and not getattr(case, "__unittest_skip__", False)
    }


CASES = _cases()


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_the_onnx_suite(name):
    CASES[name](None)


def test_the_suite_is_not_empty():
    """The 18 convolutions that the package has held for years; a change of its names must not pass unseen."""
    assert sum("conv" in name.lower() for name in CASES) >= 18
    assert sum("pool" in name.lower() for name in CASES) >= 20
