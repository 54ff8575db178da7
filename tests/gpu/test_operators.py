"""Operators: the public functions on a device's arrays, the kernels' sources run on the host, against the same cases,
definitions and bounds as on the CPU."""

import numpy as np
import pytest

import cconv
from cconv.planning import LrnSpec, PointwiseSpec, SoftmaxSpec, plan, specs
from cconv.planning.specs import as_activation
from cconv.weights import Weights


@pytest.fixture(scope="session")
def convolutions(borrow):
    return borrow("backends/test_convolution.py")


def test_whole_numbers_give_exactly_the_definition(
    convolutions, twin_of_arrays, dtype, case, whole, convolve, by_definition
):
    convolutions.test_whole_numbers_give_exactly_the_definition(
        twin_of_arrays, dtype, case, whole, convolve, by_definition
    )


def test_bias_and_residual_are_added_exactly(convolutions, twin_of_arrays, dtype, case, whole, convolve, by_definition):
    convolutions.test_bias_and_residual_are_added_exactly(twin_of_arrays, dtype, case, whole, convolve, by_definition)


def test_zero_mean_data_stays_within_the_bound(
    convolutions, twin_of_arrays, dtype, case, normal, convolve, assert_within_bound
):
    convolutions.test_zero_mean_data_stays_within_the_bound(
        twin_of_arrays, dtype, case, normal, convolve, assert_within_bound
    )


def test_positive_data_stays_within_the_bound(
    convolutions, twin_of_arrays, dtype, case, rng, convolve, assert_within_bound
):
    convolutions.test_positive_data_stays_within_the_bound(
        twin_of_arrays, dtype, case, rng, convolve, assert_within_bound
    )


@pytest.mark.parametrize("depth", [64, 96, 97, 511, 512, 4608, 25088])
def test_a_sum_of_equal_terms_does_not_drift(convolutions, twin_of_arrays, depth, convolve, assert_within_bound):
    convolutions.test_a_sum_of_equal_terms_does_not_drift(twin_of_arrays, depth, convolve, assert_within_bound)


def test_subnormal_numbers_are_not_flushed(convolutions, twin_of_arrays, convolve):
    convolutions.test_subnormal_numbers_are_not_flushed(twin_of_arrays, convolve)


def test_cpu_and_gpu_agree_within_twice_the_bound(twin_of_arrays, normal, convolve):
    x, weight = normal((2, 64, 12, 13)), normal((48, 64, 3, 3))
    cpu, gpu = (convolve(twin, x, weight, padding=1) for twin in (cconv.backend.get("cpu"), twin_of_arrays))
    for a, b in zip(cpu, gpu, strict=True):
        assert np.linalg.norm(a - b) <= 2 * 2e-6 * np.linalg.norm(a)


class TestArguments:
    """What ops.py does with arrays that are not NumPy's."""

    @pytest.fixture
    def operands(self, twin_of_arrays, whole):
        return twin_of_arrays.asarray(whole((2, 3, 6, 7))), twin_of_arrays.asarray(whole((4, 3, 3, 3)))

    def test_a_layer_packs_once_and_gives_what_the_function_gives(self, operands, host):
        x, weight = operands
        layer = cconv.Conv2d(weight, activation="relu")
        first, again = layer(x), layer(x)
        assert isinstance(first, host.HostArray)
        np.testing.assert_array_equal(first.array, again.array)
        np.testing.assert_array_equal(first.array, cconv.conv2d(x, weight, activation="relu").array)
        np.testing.assert_array_equal(layer(x[0]).array, first.array[0])

    def test_outputs_are_written_where_they_should_be(self, operands, host):
        x, weight = operands
        want = cconv.conv2d(x, weight)
        out = host.HostArray(np.zeros(want.shape, np.float32))
        assert cconv.conv2d(x, weight, out=out) is out
        np.testing.assert_array_equal(out.array, want.array)
        wide = host.HostArray(np.zeros((*want.shape[:3], 9), np.float32)[..., : want.shape[3]])
        assert cconv.conv2d(x, weight, out=wide) is wide
        np.testing.assert_array_equal(wide.array, want.array)

    def test_an_output_may_be_the_residual_but_not_overlap_x(self, operands, host):
        x, weight = operands
        want = cconv.conv2d(x, weight)
        both = host.HostArray(np.ones(want.shape, np.float32))
        assert cconv.conv2d(x, weight, residual=both, out=both) is both
        np.testing.assert_array_equal(both.array, want.array + 1)
        room = host.HostArray(np.zeros(1000, np.float32))
        x, out = room[:252].reshape(2, 3, 6, 7), room[200 : 200 + want.size].reshape(want.shape)
        with pytest.raises(cconv.ArgumentError, match="out: expected memory apart from x's"):
            cconv.conv2d(x, weight, out=out)
        cconv.conv2d(x, weight, out=room[252 : 252 + want.size].reshape(want.shape))

    def test_arrays_of_two_devices_are_refused(self, operands, host):
        x, weight = operands
        with pytest.raises(cconv.DTypeError, match="weight: expected an array on gpu like x, got one on cpu"):
            cconv.conv2d(x, weight.array)
        with pytest.raises(cconv.DTypeError, match=r"out: expected a .* array, got ndarray"):
            cconv.conv2d(x, weight, out=np.zeros((2, 4, 4, 5), np.float32))

    def test_strides_do_not_matter(self, operands, host):
        x, weight = operands
        turned = host.HostArray(np.asfortranarray(x.array))
        np.testing.assert_array_equal(cconv.conv2d(turned, weight).array, cconv.conv2d(x, weight).array)

    def test_winograd_is_refused(self, operands):
        with pytest.raises(cconv.ArgumentError, match="on a GPU, got 'winograd'"):
            cconv.conv2d(*operands, algorithm="winograd")


@pytest.fixture(scope="session")
def pools(borrow):
    return borrow("backends/test_pooling.py")


def test_pools_give_the_definition(pools, twin_of_arrays, dtype, normal):
    x = normal(pools.IMAGE, dtype)
    x[1, 2, 3, 4] = np.nan
    given = twin_of_arrays.asarray(x)
    for kernel, options in (p.values for p in pools.WINDOWS):
        got = cconv.max_pool2d(given, kernel, **options).array
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, pools._oracle(x, "max", kernel, **options))
        for include in (True, False):
            got = cconv.avg_pool2d(given, kernel, **options, count_include_pad=include).array
            want = pools._oracle(x, "average", kernel, **options, count_include_pad=include)
            np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == "float32" else 1e-14, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 11, 13), (1, 3, 40, 41), (3, 17, 1, 1), (5, 6, 7)])
def test_global_pools_reduce_each_map(twin_of_arrays, dtype, shape, normal):
    x = normal(shape, dtype)
    given, exact = twin_of_arrays.asarray(x), x.astype(np.float64)
    np.testing.assert_array_equal(cconv.global_max_pool2d(given).array, exact.max(axis=(-2, -1), keepdims=True))
    mean, size = cconv.global_avg_pool2d(given).array, np.abs(exact).mean(axis=(-2, -1), keepdims=True)
    assert (np.abs(mean - exact.mean(axis=(-2, -1), keepdims=True)) <= 2e-6 * size).all()


def test_a_global_average_of_equal_numbers_is_that_number(pools, twin_of_arrays):
    pools.test_a_global_average_of_equal_numbers_is_that_number(twin_of_arrays)


def test_every_activation_holds_on_the_whole_line(borrow, twin_of_arrays, activation, dtype):
    module = borrow("backends/test_activations.py")
    x = module.POINTS.astype(dtype).reshape(1, 1, 2, -1)
    got = cconv.activate(twin_of_arrays.asarray(x), activation).array
    module._assert_close(got, module._expected(x, activation), x, dtype)
    nan = cconv.activate(twin_of_arrays.asarray(np.full((1, 3, 5), np.nan, dtype)), activation).array
    assert np.isnan(nan).all()


@pytest.mark.parametrize("groups", [1, 16])
def test_an_activation_has_the_same_bits_fused_or_apart(twin_of_arrays, activation, dtype, groups, normal):
    x, weight = (twin_of_arrays.asarray(normal(s, dtype)) for s in ((1, 16, 6, 7), (16, 16 // groups, 3, 3)))
    apart = cconv.activate(cconv.conv2d(x, weight, groups=groups), activation)
    fused = cconv.conv2d(x, weight, groups=groups, activation=activation)
    np.testing.assert_array_equal(fused.array, apart.array)


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 5000])
def test_sums_of_two_maps_are_exact(machine_twin, dtype, size, whole):
    spec = PointwiseSpec(1, 1, size, True, as_activation("relu"), dtype)
    x, other = whole((3, 1, 1, size), dtype), whole((3, 1, 1, size), dtype)
    program = machine_twin.build(plan.single(spec, machine_twin.machine()), Weights({}.__getitem__))
    np.testing.assert_array_equal(program.run([x, other])[0], np.maximum(x + other, 0))


def test_a_program_of_several_steps_keeps_its_maps_in_one_arena(machine_twin, whole, dtype):
    """conv -> pool -> conv, twice as many images in the second run; the arena begins as NaN."""
    a = specs.conv((3, 9, 10), (5, 3, 3, 3), padding=1, activation="relu", dtype=dtype)
    b = specs.pool("max", a.output, 2, dtype=dtype)
    c = specs.conv(b.output, (6, 5, 3, 3), padding=1, dtype=dtype)
    operations = (
        plan.Operation(a, (0,), 1, "a"), plan.Operation(b, (1,), 2), plan.Operation(c, (2,), 3, "c"),
    )  # fmt: skip
    arrays = {"a": (whole((5, 3, 3, 3), dtype), None), "c": (whole((6, 5, 3, 3), dtype, reach=2), None)}
    made, reference = (
        twin.build(plan.make(operations, {0: (3, 9, 10)}, (3,), twin.machine()), Weights(arrays.__getitem__))
        for twin in (machine_twin, cconv.backend.get("reference"))
    )
    assert made.plan.arena.size
    for images in (1, 4):
        x = whole((images, 3, 9, 10), dtype)
        np.testing.assert_array_equal(made.run([x])[0], reference.run([x])[0])


def test_wide_softmax_and_lrn_agree_with_the_reference(machine_twin, dtype, normal):
    for spec in (SoftmaxSpec(1000, 1, dtype), SoftmaxSpec(5, 300, dtype), LrnSpec(9, 40, 5, 0.3, 0.75, 1.5, dtype)):
        x = normal((3, *spec.image), dtype)
        got, want = (
            twin.build(plan.single(spec, twin.machine()), Weights({}.__getitem__)).run([x])[0]
            for twin in (machine_twin, cconv.backend.get("reference"))
        )
        np.testing.assert_allclose(got, want, rtol=1e-5 if dtype == "float32" else 1e-13)
