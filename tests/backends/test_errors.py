"""Errors: a bad argument gives a typed error that names it, says what was expected and what came; nothing is run."""

import numpy as np
import pytest

import cconv
from cconv import ArgumentError, DTypeError, ShapeError

F32 = np.float32


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


X, W = ones(2, 3, 8, 8), ones(4, 3, 3, 3)


def conv(x=X, weight=W, bias=None, **options):
    return lambda: cconv.conv2d(x, weight, bias, **options)


#: What is done, the error, and words that its text must hold: the argument, what was expected, what came.
BAD = {
    "x without channels": (conv(x=ones(8, 8)), ShapeError, ["x:", "(N, C, H, W)", "(8, 8)"]),
    "x with five axes": (conv(x=ones(1, 1, 3, 8, 8)), ShapeError, ["x:", "3 or 4 axes"]),
    "weight with three axes": (conv(weight=ones(3, 3, 3)), ShapeError, ["weight:", "4 axes", "(3, 3, 3)"]),
    "mismatched channels": (conv(weight=ones(4, 5, 3, 3)), ShapeError, ["channels", "got 3", "(4, 5, 3, 3)"]),
    "no images": (conv(x=ones(0, 3, 8, 8)), ShapeError, ["x", "(0, 3, 8, 8)", ">= 1", "got 0"]),
    "no rows": (conv(x=ones(1, 3, 0, 8)), ShapeError, ["x", ">= 1"]),
    "no filters": (conv(weight=ones(0, 3, 3, 3)), ShapeError, ["weight", ">= 1"]),
    "an empty kernel": (conv(weight=ones(4, 3, 0, 3)), ShapeError, ["weight", ">= 1"]),
    "kernel too large": (conv(weight=ones(4, 3, 9, 3)), ShapeError, ["kernel", "9x3", "8x8"]),
    "kernel too large when dilated": (conv(dilation=4), ShapeError, ["dilation (4, 4)"]),
    "groups that do not divide": (conv(groups=2), ShapeError, ["groups:", "C=3", "K=4", "got 2"]),
    "zero groups": (conv(groups=0), ShapeError, ["groups:", "got 0"]),
    "groups as text": (conv(groups="3"), ShapeError, ["groups:", "'3'"]),
    "groups as a list": (conv(groups=[1]), ShapeError, ["groups:", "[1]"]),
    "zero stride": (conv(stride=0), ShapeError, ["stride:", ">= 1", "got 0"]),
    "negative stride": (conv(stride=(1, -1)), ShapeError, ["stride:", "got -1"]),
    "fractional stride": (conv(stride=1.5), ShapeError, ["stride:", "integer", "1.5"]),
    "boolean stride": (conv(stride=True), ShapeError, ["stride:", "True"]),
    "three strides": (conv(stride=(1, 1, 1)), ShapeError, ["stride:", "pair", "(1, 1, 1)"]),
    "no stride": (conv(stride=None), ShapeError, ["stride:", "None"]),
    "stride as floats, after the same as integers": (
        lambda: (conv(stride=(2, 2))(), conv(stride=(2.0, 2.0))()), ShapeError, ["stride", "2.0"],
    ),
    "a huge stride": (conv(stride=2**70), ShapeError, ["stride", "2147483647"]),
    "a huge padding": (conv(padding=2**62), ShapeError, ["padding", "2147483647"]),
    "a result beyond counting": (conv(padding=10**9), ShapeError, ["x", "elements"]),
    "a slope beyond floats": (conv(activation=("leaky_relu", 10**400)), ArgumentError, ["activation", "finite"]),
    "too many threads": (lambda: cconv.set_num_threads(2**40), ArgumentError, ["set_num_threads", "1024"]),
    "a masked array": (lambda: cconv.conv2d(np.ma.array(X), W), DTypeError, ["x", "mask"]),
    "a cost with an array as bias": (
        lambda: cconv.conv2d_cost((3, 9, 9), (5, 3, 3, 3), bias=np.zeros(5)), ArgumentError, ["bias", "True or False"],
    ),
    "a rate as text": (
        lambda: cconv.estimate(cconv.Cost(macs=1), macs_per_s="1"), ArgumentError, ["rate above 0", "'1'"],
    ),
    "stride as an array": (conv(stride=np.ones(2)), ShapeError, ["stride", "expected an integer"]),
    "negative padding": (conv(padding=-1), ShapeError, ["padding:", ">= 0", "got -1"]),
    "three paddings": (conv(padding=(1, 1, 1)), ShapeError, ["padding:", "(1, 1, 1)"]),
    "unknown padding": (conv(padding="full"), ArgumentError, ["padding:", '"same"', "'full'"]),
    "zero dilation": (conv(dilation=0), ShapeError, ["dilation:", "got 0"]),
    "unknown activation": (conv(activation="mish"), ArgumentError, ["activation:", "relu", "'mish'"]),
    "activation as a function": (conv(activation=np.tanh), ArgumentError, ["activation:"]),
    "a slope for relu": (conv(activation=("relu", 0.1)), ArgumentError, ["relu takes no parameter"]),
    "a slope as text": (conv(activation=("leaky_relu", "a")), ArgumentError, ["activation", "'a'"]),
    "unknown precision": (conv(precision="low"), ArgumentError, ["precision:", "highest", "'low'"]),
    "precision as a list": (conv(precision=["high"]), ArgumentError, ["precision", "high"]),
    "unknown algorithm": (conv(algorithm="fast"), ArgumentError, ["algorithm:", "direct", "'fast'"]),
    "bias too long": (conv(bias=ones(5)), ShapeError, ["bias:", "(4,)", "(4, 3)", "(5,)"]),
    "bias as a number": (conv(bias=1.0), DTypeError, ["bias:", "array", "float"]),
    "residual of another shape": (conv(residual=X), ShapeError, ["residual:", "(2, 4, 6, 6)", "(2, 3, 8, 8)"]),
    "integers": (conv(x=X.astype(int)), DTypeError, ["x:", "float32", "int64", "astype"]),
    "unsigned bytes": (conv(x=X.astype(np.uint8)), DTypeError, ["x:", "uint8", "astype"]),
    "booleans": (conv(x=X.astype(bool)), DTypeError, ["x:", "bool"]),
    "complex numbers": (conv(x=X.astype(complex)), DTypeError, ["x:", "complex128"]),
    "half precision": (conv(x=X.astype(np.float16)), DTypeError, ["x:", "float16"]),
    "objects": (conv(x=X.astype(object)), DTypeError, ["x:", "object"]),
    "text": (conv(x=np.full(X.shape, "a")), DTypeError, ["x:", "str"]),
    "a list": (conv(x=X.tolist()), DTypeError, ["x:", "NumPy", "list"]),
    "nothing": (conv(x=None), DTypeError, ["x:", "NoneType"]),
    "foreign byte order": (conv(x=X.astype(">f4")), DTypeError, ["x:", "byte order"]),
    "two types, weight": (conv(weight=W.astype(float)), DTypeError, ["weight:", "float32", "float64"]),
    "two types, bias": (conv(bias=ones(4, dtype=float)), DTypeError, ["bias:", "float32", "float64"]),
    "two types, residual": (
        conv(residual=ones(2, 4, 6, 6, dtype=float)), DTypeError, ["residual:", "float64"],
    ),
    "out of another shape": (conv(out=ones(2, 4, 8, 8)), ShapeError, ["out:", "(2, 4, 6, 6)"]),
    "out of another type": (conv(out=ones(2, 4, 6, 6, dtype=float)), DTypeError, ["out:", "float64"]),
    "out as a list": (conv(out=[]), DTypeError, ["out:", "list"]),
    "out that is x": (conv(weight=ones(3, 3, 1, 1), out=X), ArgumentError, ["out:", "x's", "overlapping"]),
    "out read-only": (
        conv(out=np.broadcast_to(F32(0), (2, 4, 6, 6))), ArgumentError, ["out:", "read-only"],
    ),
    "a window too large": (lambda: cconv.max_pool2d(X, 9), ShapeError, ["kernel_size:", "(9, 9)", "8x8"]),
    "an empty window": (lambda: cconv.max_pool2d(X, 0), ShapeError, ["kernel_size:", "got 0"]),
    "a window of padding alone": (lambda: cconv.max_pool2d(X, 2, 1, 2), ShapeError, ["padding:", "than the kernel"]),
    "a pool of integers": (lambda: cconv.avg_pool2d(X.astype(int), 2), DTypeError, ["x:", "int64"]),
    "a pool of a matrix": (lambda: cconv.global_avg_pool2d(ones(8, 8)), ShapeError, ["x:", "(8, 8)"]),
    "an unknown activation": (lambda: cconv.activate(X, "swishy"), ArgumentError, ["activation:", "silu", "'swishy'"]),
    "cost of a shape with two axes": (lambda: cconv.conv2d_cost((8, 8), W.shape), ShapeError, ["x_shape:", "(8, 8)"]),
    "cost of three axes": (lambda: cconv.conv2d_cost(X.shape, (4, 3, 3)), ShapeError, ["weight:", "(4, 3, 3)"]),
    "cost of a number": (lambda: cconv.conv2d_cost(8, W.shape), ShapeError, ["x_shape", "8"]),
    "cost of a fraction": (lambda: cconv.conv2d_cost((1, 3, 8.5, 8), W.shape), ShapeError, ["x_shape", "8.5"]),
    "an estimate without a rate": (lambda: cconv.estimate(cconv.Cost(1)), ArgumentError, ["exactly one"]),
    "an estimate with two rates": (
        lambda: cconv.estimate(cconv.Cost(1), macs_per_s=1, flops_per_s=1), ArgumentError, ["exactly one"],
    ),
    "an estimate at 0": (lambda: cconv.estimate(cconv.Cost(1), macs_per_s=0), ArgumentError, ["rate above 0", "0"]),
    "an estimate at no rate": (lambda: cconv.estimate(cconv.Cost(1), macs_per_s=np.nan), ArgumentError, ["nan"]),
    "an estimate of half": (lambda: cconv.estimate(cconv.Cost(1), 1.5, macs_per_s=1), ShapeError, ["samples:", "1.5"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_gives_a_typed_error_that_explains_itself(what):
    call, error, words = BAD[what]
    with pytest.raises(cconv.CconvError) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ShapeError, ValueError),
        (DTypeError, TypeError),
        (ArgumentError, ValueError),
        (cconv.ModelError, ValueError),
        (cconv.ImageError, ValueError),
        (cconv.BackendUnavailable, RuntimeError),
    ],
    ids=lambda error: error.__name__,
)
def test_errors_are_also_the_builtin_ones_that_python_users_catch(error, builtin):
    assert issubclass(error, builtin)


def test_a_refused_call_leaves_out_alone():
    out = np.full((2, 4, 6, 6), 7, F32)
    for options in ({"residual": X}, {"activation": "mish"}, {"bias": ones(5)}):
        with pytest.raises(cconv.CconvError):
            cconv.conv2d(X, W, **options, out=out)
    assert (out == 7).all()


def test_a_shape_too_large_to_exist_is_counted_and_not_allocated():
    """Costs are exact ints beyond 2**63; an image of that size could never be held."""
    cost = cconv.conv2d_cost((2**20, 2**10, 2**16, 2**16), (2**10, 2**10, 3, 3), padding=1)
    assert cost.macs == 2**20 * 2**10 * 2**32 * 2**10 * 9
    view = np.broadcast_to(F32(1), (1, 1, 2**20, 2**20))
    with pytest.raises(MemoryError):
        cconv.conv2d(view, ones(1, 1, 1, 1))
