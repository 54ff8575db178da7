"""Half: float16 and bfloat16: kept in 16 bits, summed in float32, rounded once, so whole numbers are exact."""

import numpy as np
import pytest

import cconv
from cconv import reference
from cconv.gpu import compile
from cconv.planning import cuda, plan, specs, tensors
from cconv.planning.specs import as_activation
from cconv.weights import Weights

ml_dtypes = pytest.importorskip("ml_dtypes")
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
#: Half of what two neighbouring numbers differ by, relative.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(params=["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def half(request) -> str:
    return request.param


def _run(twin, spec, *inputs, weights=(), tiling=None) -> np.ndarray:
    """One operator on a twin."""
    made = plan.single(spec, twin.machine(), tiling)
    given = Weights(lambda _: weights) if weights else Weights({}.__getitem__)
    return twin.to_numpy(twin.build(made, given).run([twin.asarray(x) for x in inputs])[0])


def _close(got, want, half: str, roundings: float = 1.01) -> None:
    """Within so many roundings of the exact result, or of the least normal number."""
    want = np.asarray(want).reshape(got.shape)
    least = float(ml_dtypes.finfo(HALVES[half]).smallest_normal)
    error = np.abs(got.astype(np.float64) - want)
    assert (error <= roundings * ROUNDING[half] * np.maximum(np.abs(want), least)).all(), error.max()


def test_whole_numbers_give_exactly_the_definition(twin_of_arrays, half, case, whole, by_definition):
    x, weight = (whole(shape, HALVES[half], reach=4) for shape in (case.x, case.weight))
    got = cconv.conv2d(twin_of_arrays.asarray(x), twin_of_arrays.asarray(weight), **case.options)
    assert got.dtype == HALVES[half]
    want = by_definition(x, weight, **case.options)
    np.testing.assert_array_equal(twin_of_arrays.to_numpy(got), want.astype(HALVES[half]))


@pytest.mark.parametrize(
    ("image", "weight", "options"),
    [
        ((20, 9, 11), (40, 20, 3, 3), {"padding": 1}),
        ((20, 8, 8), (130, 20, 1, 1), {}),
        ((6, 7, 9), (34, 3, 3, 2), {"groups": 2, "stride": (2, 1)}),
        ((5, 12, 16), (10, 1, 3, 3), {"groups": 5, "padding": 1}),
        ((5, 13, 14), (5, 1, 5, 5), {"groups": 5, "stride": 2, "padding": 2}),
    ],
)
def test_every_tile_rounds_once(machine_twin, half, whole, image, weight, options):
    spec = specs.conv(image, weight, bias=True, residual=True, activation="relu", dtype=half, **options)
    exact = specs.conv(image, weight, bias=True, residual=True, activation="relu", dtype="float64", **options)
    x, w, b, r = (whole(s, HALVES[half], reach=4) for s in ((3, *image), weight, weight[:1], (3, *spec.output)))
    want = _run(reference, exact, x, r, weights=(w, b)).astype(HALVES[half])
    for tiling in cuda.candidates(spec):
        np.testing.assert_array_equal(_run(machine_twin, spec, x, r, weights=(w, b), tiling=tiling), want)


def test_what_comes_before_a_convolution_rides_along(machine_twin, half, whole):
    from dataclasses import replace

    spec = replace(specs.conv((19, 5, 7), (40, 19, 1, 1), dtype=half), preactivated=True)
    x, w, before = (whole(s, HALVES[half], reach=3) for s in ((2, 19, 5, 7), (40, 19, 1, 1), (2, 19)))
    want = _run(reference, replace(spec, dtype="float64"), x, weights=(w, None, before))
    for tiling in cuda.candidates(spec):
        got = _run(machine_twin, spec, x, weights=(w, None, before), tiling=tiling)
        np.testing.assert_array_equal(got, want.astype(HALVES[half]))


@pytest.mark.parametrize("half", HALVES)
def test_all_numbers_come_through_and_sums_round_to_even(twin_of_arrays, half):
    """Every bit pattern, with another one at random: infinities, NaN and subnormal numbers too."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(HALVES[half])
    others = np.random.default_rng(0).permutation(numbers)
    spec = specs.PointwiseSpec(1, 1, 1 << 16, True, None, half)
    with np.errstate(all="ignore"):
        want = (numbers.astype(np.float32) + others.astype(np.float32)).astype(HALVES[half])
    shape = 1, 1, 1, 1 << 16
    got = _run(twin_of_arrays, spec, numbers.reshape(shape), others.reshape(shape)).ravel()
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    moved = _run(twin_of_arrays, tensors.move((1 << 16,), (1 << 16,), [tensors.Axis(1 << 16, 1, 1)], dtype=half),
                 numbers.reshape(shape))  # fmt: skip
    assert moved.tobytes() == numbers.tobytes()


#: Floats as they come to be stored.
NARROW = """
#define THREADS 64
struct Narrow {
    const float *x;
    T *y;
};
CC_KERNEL(THREADS) narrow(const Narrow p) {
    const int i = cc_block() * THREADS + cc_thread();
    p.y[i] = p.x[i];
}
"""


def test_any_float_becomes_the_nearest_bfloat_and_nan_stays_nan(host, scratch):
    """A device's own NaN has all bits set: rounded like a number it would be zero. No sum on a host is such a one."""
    upper, lower = np.meshgrid(np.arange(1 << 16), (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF), indexing="ij")
    x = (upper << 16 | lower).astype(np.uint32).view(np.float32).ravel()
    y = np.zeros(x.size, HALVES["bfloat16"])
    library = host.library(f'#define T Bfloat\n#include "{compile.HEADER}"\n{NARROW}', "narrow", scratch)
    assert host.run(library, np.array((x.ctypes.data, y.ctypes.data), np.uint64), x.size // 64, 64, 1) is None
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(y.astype(np.float32), x.astype(HALVES["bfloat16"]).astype(np.float32))


def test_activations_are_the_nearest_number(twin_of_arrays, half, activation, rng):
    # Not far below zero, where the reference's own 1 + erf cancels.
    x = np.maximum(-6, 4 * rng.standard_normal((1, 1, 1, 5000))).astype(HALVES[half])
    got = _run(twin_of_arrays, specs.PointwiseSpec(1, 1, 5000, False, as_activation(activation), half), x)
    _close(got, reference.activate(x.astype(np.float64), as_activation(activation)), half, 1.1)


def test_pools_are_right_to_the_last_bit(twin_of_arrays, half, whole):
    x = whole((2, 3, 24, 25), HALVES[half], reach=50)
    given, wide = twin_of_arrays.asarray(x), x.astype(np.float64)
    for kernel, options in ((2, {}), (3, {"stride": 2, "padding": 1}), ((20, 20), {})):
        got = twin_of_arrays.to_numpy(cconv.max_pool2d(given, kernel, **options))
        np.testing.assert_array_equal(got, cconv.max_pool2d(wide, kernel, **options).astype(HALVES[half]))
        got = twin_of_arrays.to_numpy(cconv.avg_pool2d(given, kernel, **options))
        _close(got, cconv.avg_pool2d(wide, kernel, **options), half)


def test_tensors_agree_with_the_reference(twin_of_arrays, half, rng):
    def draw(*shape):
        return (2 + rng.random(shape)).astype(HALVES[half])

    for spec, shapes in (
        *(
            (tensors.arithmetic(kind, (3, 5, 7), (5, 1), dtype=half), ((3, 5, 7), (5, 1)))
            for kind in tensors.ARITHMETIC
        ),
        (specs.PointwiseSpec(3, 5, 7, True, None, half), ((3, 5, 7), (3, 5, 7))),
        (tensors.SoftmaxSpec(1000, 1, half), ((1000, 1, 1),)),
        (tensors.SoftmaxSpec(5, 30, half), ((5, 30, 1),)),
        (tensors.LrnSpec(9, 40, 5, 0.3, 0.75, 1.5, half), ((9, 40, 1),)),
        (tensors.matmul((30, 70), (70, 20), dtype=half), ((30, 70), (70, 20))),
    ):
        inputs = [draw(2, *shape) for shape in shapes]
        want = _run(reference, spec, *inputs)
        _close(_run(twin_of_arrays, spec, *inputs), want, half, 1.1)


def test_the_cpu_refuses_them(half):
    x = np.ones((1, 1, 4, 4), HALVES[half])
    with pytest.raises(cconv.DTypeError, match=f"x: dtype: expected one of float32, float64, got {half}"):
        cconv.conv2d(x, np.ones((1, 1, 1, 1), HALVES[half]))


def test_types_do_not_mix(twin_of_arrays, half):
    x, weight = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 1, 1), HALVES[half])
    with pytest.raises(cconv.DTypeError, match=f"weight: expected float32, the type of x, got {half}"):
        cconv.conv2d(twin_of_arrays.asarray(x), twin_of_arrays.asarray(weight))
