"""The kernels that move, spread, normalise and interpolate, ISA by ISA, against the reference twin's formulas."""

import numpy as np
import pytest

from cconv import cpu, reference
from cconv.planning import LrnSpec, Operation, ResizeSpec, SoftmaxSpec, plan, tensors
from cconv.planning.tensors import Axis, Blend, FunctionSpec
from cconv.weights import Weights

ISAS = [name for name, usable, *_ in cpu.instruction_sets() if usable]
#: Around a vector, around a task.
SIZES = [1, 3, 7, 8, 9, 17, 64, 1000, (1 << 14) + 5]


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


def run(twin, machine, spec, x, second=None, weight=None):
    program = twin.build(plan.single(spec, machine), Weights(lambda _: (weight, None)))
    return program.run([x] if second is None else [x, second])[0]


def both(isa, spec, x, second=None, weight=None):
    """The same bits from one thread and two, and from a batch and its images; and what the reference says."""
    got = run(cpu, cpu.machine_of(isa, 2), spec, x, second, weight)
    np.testing.assert_array_equal(got, run(cpu, cpu.machine_of(isa, 1), spec, x, second, weight))
    for i in range(len(x)):
        alone = run(cpu, cpu.machine_of(isa, 2), spec, x[i : i + 1], second if second is None else second[i : i + 1],
                    weight)  # fmt: skip
        np.testing.assert_array_equal(got[i : i + 1], alone)
    return got, run(reference, reference.machine(), spec, x, second, weight)


def rows(rng, n, size, dtype):
    return rng.standard_normal((n, 1, 1, size)).astype(dtype)


def close(got, want, dtype, scale=1):
    assert got.dtype == np.dtype(dtype)
    tolerance = (2e-6 if dtype == "float32" else 1e-14) * scale
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


MOVES = {
    "transposed": lambda d: tensors.move(
        (3, 5, 7), (7, 3, 5), [Axis(7, 1, 15), Axis(3, 35, 5), Axis(5, 7, 1)], dtype=d
    ),
    "as it is": lambda d: tensors.move((4, 6), (4, 6), [Axis(4, 6, 6), Axis(6, 1, 1)], dtype=d),
    "backwards": lambda d: tensors.move((1000,), (500,), [Axis(500, -2, 1)], begin=999, dtype=d),
    "by a table": lambda d: tensors.move((3, 8), (3, 4), [Axis(3, 8, 4), Axis(4, 1, 1, (7, 0, 0, 3))], dtype=d),
    "rows by a table": lambda d: tensors.move((4, 9), (3, 9), [Axis(3, 9, 9, (27, 0, 9)), Axis(9, 1, 1)], dtype=d),
    "padded": lambda d: tensors.move((2, 3), (4, 6), [Axis(2, 3, 6), Axis(3, 1, 1)], at=8, fill=-2.5, dtype=d),
    "spread out": lambda d: tensors.move((5, 40), (9, 79), [Axis(5, 40, 158), Axis(40, 1, 2)], fill=0.0, dtype=d),
    "one number": lambda d: tensors.move((1,), (1, 1), [Axis(1, 1, 1), Axis(1, 1, 1)], dtype=d),
    "large": lambda d: tensors.move((300, 200), (200, 300), [Axis(200, 1, 300), Axis(300, 200, 1)], dtype=d),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_put_every_element_where_the_reference_does(isa, dtype, name, rng):
    spec = MOVES[name](dtype)
    got, want = both(isa, spec, rows(rng, 3, spec.source, dtype))
    np.testing.assert_array_equal(got, want)


def test_several_moves_fill_one_value(isa, dtype, rng):
    """A concatenation: what one writes the other leaves, whether it lies in the arena or is given."""
    left = tensors.move((2, 3), (2, 8), [Axis(2, 3, 8), Axis(3, 1, 1)], dtype=dtype)
    right = tensors.move((2, 5), (2, 8), [Axis(2, 5, 8), Axis(5, 1, 1)], at=3, dtype=dtype)
    last = tensors.move((16,), (16,), [Axis(16, 1, 1)], dtype=dtype)
    operations = Operation(left, (0,), 2), Operation(right, (1,), 2), Operation(last, (2,), 3)
    x, y = rows(rng, 4, 6, dtype), rows(rng, 4, 10, dtype)
    want = np.concatenate([x.reshape(4, 2, 3), y.reshape(4, 2, 5)], axis=2).reshape(4, 16)
    for outputs in ((2,), (3,), (3, 2)):
        made = plan.make(operations, {0: (1, 1, 6), 1: (1, 1, 10)}, outputs, cpu.machine_of(isa, 2))
        for result in cpu.build(made, Weights(lambda _: ())).run([x, y]):
            np.testing.assert_array_equal(result.reshape(4, 16), want)
        given = [np.zeros((4, 1, 1, 16), dtype) for _ in outputs]
        cpu.build(made, Weights(lambda _: ())).run([x, y], given)
        np.testing.assert_array_equal(given[0].reshape(4, 16), want)


SPREAD = [
    ((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((2, 3, 4), (4,)), ((2, 3, 4), ()), ((3, 1), (2, 3, 4)),
    ((2, 1, 5, 1, 7), (3, 1, 6, 1)), ((1, 40, 29, 31), (40, 1, 1)), ((17,), (17,)), ((), (9,)),
]  # fmt: skip
NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
         "prelu": lambda x, slope: np.where(x < 0, slope * x, x)}  # fmt: skip


@pytest.mark.parametrize("kind", tensors.ARITHMETIC)
@pytest.mark.parametrize("shapes", SPREAD, ids=str)
def test_arithmetic_spreads_as_numpy_spreads(isa, dtype, kind, shapes, rng):
    x, other = ((rng.uniform(0.5, 2, (3, *shape)) * rng.choice([-1, 1])).astype(dtype) for shape in shapes)
    for swapped in (False, True):
        expected = [NUMPY[kind](*((b, a) if swapped else (a, b))) for a, b in zip(x, other, strict=True)]
        spec = tensors.arithmetic(kind, *shapes, swapped=swapped, dtype=dtype)
        flat = [a.reshape(3, 1, 1, -1) for a in (x, other)]
        got, want = both(isa, spec, *flat)
        close(got, want, dtype)
        close(got.ravel(), np.stack(expected).ravel(), dtype)
        constant = tensors.arithmetic(kind, *shapes, constant=True, swapped=swapped, dtype=dtype)
        got, want = both(isa, constant, flat[0], weight=other[0])
        close(got, want, dtype)


FUNCTIONS = (
    ("ramp", (0.2, 0.5, 0.0, 1.0)), ("clip", (-0.5, 0.25)), ("clip", (1.0, -1.0)), ("gelu_tanh", ()), ("swish", (1.7,)),
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "parameters"), FUNCTIONS)
def test_functions_are_their_formulas(isa, dtype, kind, parameters, size, rng):
    got, want = both(isa, FunctionSpec(kind, size, parameters, dtype), 4 * rows(rng, 2, size, dtype))
    if parameters == (1.0, -1.0):  # ONNX: where the bounds cross, the upper one wins
        want = np.full_like(want, -1.0)
    close(got, want, dtype, scale=4)


def test_nan_passes_through(isa, dtype):
    x = np.full((1, 1, 1, 9), np.nan, dtype)
    for kind, parameters in (("ramp", (1.0, 0.0, 0.0, 1.0)), ("clip", (0.0, 1.0))):
        assert np.isnan(run(cpu, cpu.machine_of(isa, 1), FunctionSpec(kind, 9, parameters, dtype), x)).all()
    for kind in ("max", "min", "prelu"):
        for a, b in ((x, np.ones_like(x)), (np.ones_like(x), x)):
            if kind != "prelu" or a is x:
                spec = tensors.arithmetic(kind, (9,), (9,), dtype=dtype)
                assert np.isnan(run(cpu, cpu.machine_of(isa, 1), spec, a, b)).all()


@pytest.mark.parametrize(("channels", "inner"), [(1, 1), (1000, 1), (5, 3), (3, 100), (64, 17)])
@pytest.mark.parametrize("far", [0, 1e4, -1e4])
def test_softmax_is_a_distribution_however_large_its_operands(isa, dtype, channels, inner, far, rng):
    x = (rng.standard_normal((3, channels, 1, inner)) + far).astype(dtype)
    got, want = both(isa, SoftmaxSpec(channels, inner, dtype), x)
    close(got, want, dtype, scale=4)
    close(got.sum(axis=1), np.ones((3, 1, inner)), dtype, scale=4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("beta", [0.5, 0.75, 1.3])
def test_lrn_sums_over_the_channels_around(isa, dtype, size, beta, rng):
    x = 3 * rng.standard_normal((2, 7, 1, 33)).astype(dtype)
    got, want = both(isa, LrnSpec(7, 33, size, 0.3, beta, 1.5, dtype), x)
    close(got, want, dtype, scale=8)


def test_resizing_blends_neighbours(isa, dtype, rng):
    rows_ = Blend((0, 0, 2), (0, 1, 3), (0.0, 0.25, 0.5))
    columns = Blend((0, 1, 1, 4), (1, 2, 1, 4), (0.75, 0.5, 0.0, 0.125))
    x = rng.standard_normal((2, 3, 4, 5)).astype(dtype)
    got, want = both(isa, ResizeSpec(3, 4, 5, rows_, columns, dtype), x)
    close(got, want, dtype)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((5, 7), (7, 9)),
        ((1, 1), (1, 1)),
        ((2, 3, 4, 5), (2, 3, 5, 17)),
        ((2, 3, 4, 5), (5, 6)),
        ((3, 1, 4, 5), (2, 5, 33)),
    ],
)
def test_matrices_multiply_as_numpys(isa, dtype, left, right, rng):
    x, other = (rng.integers(-4, 5, (2, *shape)).astype(dtype) for shape in (left, right))
    flat = [a.reshape(2, 1, 1, -1) for a in (x, other)]
    expected = np.stack([a @ b for a, b in zip(x, other, strict=True)])
    got, want = both(isa, tensors.matmul(left, right, dtype=dtype), *flat)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got.ravel(), expected.ravel())
    got, _ = both(isa, tensors.matmul(left, right, constant=True, dtype=dtype), flat[0], weight=other[0])
    np.testing.assert_array_equal(got[0].ravel(), expected[0].ravel())
