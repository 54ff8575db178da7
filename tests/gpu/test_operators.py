"""Operators: the public functions on a device's arrays, the kernels' sources run on the host, against the same cases,
definitions and bounds as on the CPU."""

import typing

import numpy as np
import pytest

import cconv
from cconv import ops
from cconv.gpu import launch, program
from cconv.planning import ConvSpec, LrnSpec, PointwiseSpec, SoftmaxSpec, cuda, plan, specs, tensors
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


@pytest.mark.parametrize("depth", [512, 4608, 25088])
def test_a_product_of_matrices_does_not_drift_either(twin_of_arrays, depth):
    x, other = np.full((1, 1, 1, depth), 0.1, np.float32), np.full((1, 1, 1, depth), 0.7, np.float32)
    got = _single(twin_of_arrays, tensors.matmul((1, depth), (depth, 1)), x, other).item()
    exact = depth * float(x[0, 0, 0, 0]) * float(other[0, 0, 0, 0])
    assert abs(got - exact) <= 2e-6 * max(1, (depth / 2304) ** 0.5) * exact


def test_subnormal_numbers_are_not_flushed(convolutions, twin_of_arrays, convolve):
    convolutions.test_subnormal_numbers_are_not_flushed(twin_of_arrays, convolve)


def test_cpu_and_gpu_agree_within_twice_the_bound(twin_of_arrays, dtype, case, normal, convolve, assert_within_bound):
    """On data of any sign and on positive data."""
    x, weight = normal(case.x, dtype), normal(case.weight, dtype)
    for operands in ((x, weight), (abs(x), abs(weight))):
        cpu, gpu = (convolve(twin, *operands, **case.options) for twin in (cconv.backend.get("cpu"), twin_of_arrays))
        zero_mean = operands[0] is x and cpu[0].size >= 64
        assert_within_bound(gpu, *operands, other=cpu, zero_mean=zero_mean, **case.options)


class TestArguments:
    """What ops.py does with arrays that are not NumPy's."""

    @pytest.fixture
    def operands(self, twin_of_arrays, whole):
        return twin_of_arrays.asarray(whole((2, 3, 6, 7))), twin_of_arrays.asarray(whole((4, 3, 3, 3)))

    @pytest.fixture
    def equal(self, twin_of_arrays):
        def check(a, b):
            np.testing.assert_array_equal(*map(twin_of_arrays.to_numpy, (a, b)))

        return check

    def test_a_layer_packs_once_and_gives_what_the_function_gives(self, operands, equal):
        x, weight = operands
        layer = cconv.Conv2d(weight, activation="relu")
        first, again = layer(x), layer(x)
        assert type(first) is type(x)
        equal(first, again)
        equal(first, cconv.conv2d(x, weight, activation="relu"))
        equal(layer(x[0]), first[0])

    def test_a_layer_refuses_what_lies_elsewhere_whatever_ran_before(self, twin_of_arrays, operands):
        x, weight = operands
        layer, elsewhere = cconv.Conv2d(weight), twin_of_arrays.to_numpy(x)
        for _ in range(2):
            with pytest.raises(cconv.DTypeError, match="x: expected an array on gpu like x, got one on cpu"):
                layer(elsewhere)
            assert type(layer(x)) is type(x)

    def test_outputs_are_written_where_they_should_be(self, twin_of_arrays, operands, equal):
        x, weight = operands
        want = cconv.conv2d(x, weight)
        out = twin_of_arrays.asarray(np.zeros(want.shape, np.float32))
        assert cconv.conv2d(x, weight, out=out) is out
        equal(out, want)
        wide = twin_of_arrays.asarray(np.zeros((*want.shape[:3], 9), np.float32))[..., : want.shape[3]]
        assert cconv.conv2d(x, weight, out=wide) is wide
        equal(wide, want)

    def test_an_output_may_be_the_residual_but_not_overlap_x(self, twin_of_arrays, operands, equal):
        x, weight = operands
        want = cconv.conv2d(x, weight)
        both = twin_of_arrays.asarray(np.ones(want.shape, np.float32))
        assert cconv.conv2d(x, weight, residual=both, out=both) is both
        np.testing.assert_array_equal(twin_of_arrays.to_numpy(both), twin_of_arrays.to_numpy(want) + 1)
        room = twin_of_arrays.asarray(np.zeros(1000, np.float32))
        x, out = room[:252].reshape(2, 3, 6, 7), room[200 : 200 + want.size].reshape(want.shape)
        with pytest.raises(cconv.ArgumentError, match="out: expected memory apart from x's"):
            cconv.conv2d(x, weight, out=out)
        cconv.conv2d(x, weight, out=room[252 : 252 + want.size].reshape(want.shape))

    def test_arrays_of_two_devices_are_refused(self, twin_of_arrays, operands):
        x, weight = operands
        with pytest.raises(cconv.DTypeError, match="weight: expected an array on gpu like x, got one on cpu"):
            cconv.conv2d(x, twin_of_arrays.to_numpy(weight))
        with pytest.raises(cconv.DTypeError, match=r"out: expected a .* array, got ndarray"):
            cconv.conv2d(x, weight, out=np.zeros((2, 4, 4, 5), np.float32))

    def test_strides_do_not_matter(self, twin_of_arrays, operands, equal):
        x, weight = operands
        apart = twin_of_arrays.asarray(np.ascontiguousarray(twin_of_arrays.to_numpy(x)[:, :, ::-1]))
        equal(cconv.conv2d(apart[:, :, ::-1], weight), cconv.conv2d(x, weight))
        equal(cconv.max_pool2d(apart[:, :, ::-1], 2), cconv.max_pool2d(x, 2))

    def test_winograd_is_refused(self, operands):
        with pytest.raises(cconv.ArgumentError, match="on a GPU, got 'winograd'"):
            cconv.conv2d(*operands, algorithm="winograd")


def test_whatever_planning_knows_has_a_kernel():
    """As on the CPU; of convolutions every kind of tiling."""
    known = {*typing.get_args(tensors.Spec), cuda.Ffma, cuda.Strips} - {ConvSpec}
    assert set(program._KERNELS) == known


def test_maps_that_no_block_can_number_are_refused():
    """Before anything is launched: between the last block's threads an int would overflow."""
    assert launch.blocks_of_maps(1, launch.MOST_BLOCKS - 256, 256)[0] == 2**23 - 1
    with pytest.raises(cconv.ShapeError, match="places on a GPU"):
        launch.blocks_of_maps(1, launch.MOST_BLOCKS - 255, 256)


def test_more_blocks_than_a_launch_has_are_refused(device):
    pack = launch.Launch(device, "pack.cu", "pack", launch.constant("pack.cu", "THREADS"), {"T": "float"})
    before = device.launches
    with pytest.raises(cconv.ShapeError, match=r"at most 2147483647 blocks on a GPU, got 2147483648"):
        pack(launch.MOST_BLOCKS + 1)
    assert device.launches == before


def test_sizes_that_no_kernel_can_count_are_refused(machine_twin):
    """Before any memory is asked for: kernels count channels, rows and columns with 32 bits."""
    for spec in (
        specs.conv((1, 1, 1), (1 << 31, 1, 1, 1)), specs.adaptive_pool("max", (1, 1, 1 << 31), (1, 1)),
        SoftmaxSpec(2**31 - 1, 1, "float32"), tensors.matmul((2**31 - 1, 1), (1, 1)),
        tensors.matmul((1, 2**31 - 1), (2**31 - 1, 1)), tensors.matmul((1, 1), (1, 2**31 - 1)),
    ):  # fmt: skip
        with pytest.raises(cconv.ShapeError, match=r"of at most 2147483\d+ on a GPU, got 214748364[78]"):
            machine_twin.prepare(plan.single(spec, machine_twin.machine()))


@pytest.fixture
def events(twin_of_arrays, monkeypatch):
    """What a host device is asked for, in order: memory that is kept, or a run's; waits; launches by their names."""
    device, found = twin_of_arrays._device, []
    kept, empty, settle, kernel = device.kept, device.empty, device.settle, device.kernel

    def spied_kernel(name, entry, macros):
        launch = kernel(name, entry, macros)
        return lambda *given: (found.append(entry), launch(*given))[1]

    def spied_empty(shape, dtype, kept=False):
        found.append("kept" if kept else "run's")
        return empty(shape, dtype, kept)

    monkeypatch.setattr(device, "kept", lambda array: (found.append("kept"), kept(array))[1])
    monkeypatch.setattr(device, "settle", lambda: (found.append("settled"), settle())[1])
    monkeypatch.setattr(device, "empty", spied_empty)
    monkeypatch.setattr(device, "kernel", spied_kernel)
    monkeypatch.setattr(ops, "_made", {})
    return found


@pytest.mark.parametrize("twin_of_arrays", ["host"], indirect=True)
class TestStreams:
    """What a layer keeps serves whatever stream asks: it is no stream's own, and complete before anything reads it."""

    def test_a_layer_keeps_its_table_and_what_it_packs(self, twin_of_arrays, whole, events):
        x, weight, bias = (twin_of_arrays.asarray(whole(s)) for s in ((2, 3, 6, 7), (4, 3, 3, 3), (4,)))
        layer = cconv.Conv2d(weight, bias)
        layer(x)
        table, weights = ["kept", "settled"], ["kept", "pack", "kept", "settled"]
        assert events == [*table, *weights, "run's", "conv"]
        events.clear()
        layer(x)
        assert events == ["run's", "conv"]

    def test_a_depthwise_layer_keeps_its_weights_as_they_are(self, twin_of_arrays, whole, events):
        x, weight, bias = (twin_of_arrays.asarray(whole(s)) for s in ((2, 3, 6, 7), (3, 1, 3, 3), (3,)))
        cconv.Conv2d(weight, bias, groups=3)(x)
        assert events == ["settled", "kept", "kept", "settled", "run's", "depthwise"]

    def test_a_function_keeps_tables_alone(self, twin_of_arrays, whole, events):
        """Its weights are used on one stream, so it need not wait for them."""
        x, weight = (twin_of_arrays.asarray(whole(s)) for s in ((2, 3, 6, 7), (4, 3, 3, 3)))
        cconv.conv2d(x, weight)
        assert events == ["kept", "settled", "run's", "pack", "run's", "conv"]
        events.clear()
        cconv.max_pool2d(x, 2)
        assert events == ["kept"] * 6 + ["settled", "run's", "pool"]


@pytest.fixture(scope="session")
def pools(borrow):
    return borrow("backends/test_pooling.py")


def test_pools_give_the_definition(pools, twin_of_arrays, dtype, normal):
    x = normal(pools.IMAGE, dtype)
    x[1, 2, 3, 4] = np.nan
    given = twin_of_arrays.asarray(x)
    for kernel, options in (p.values for p in pools.WINDOWS):
        got = twin_of_arrays.to_numpy(cconv.max_pool2d(given, kernel, **options))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, pools._oracle(x, "max", kernel, **options))
        for include in (True, False):
            got = twin_of_arrays.to_numpy(cconv.avg_pool2d(given, kernel, **options, count_include_pad=include))
            want = pools._oracle(x, "average", kernel, **options, count_include_pad=include)
            np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == "float32" else 1e-14, atol=1e-6)


def test_windows_whose_next_position_is_farther_than_32_bits_count(twin_of_arrays, whole):
    """A position plus a dilation of 2^31 - 1 is no int; by a thread per output and by a block."""
    x, far = whole((2, 3, 200, 10)), 2**31 - 1
    given = twin_of_arrays.asarray(x)
    for kernel, options in (
        (1, {"dilation": far}), ((3, 2), {"padding": (0, 0, 0, far), "dilation": (1, far), "stride": (1, 3)}),
        ((200, 2), {"padding": (0, 0, 0, far), "dilation": (1, far), "stride": (1, 3)}),
    ):  # fmt: skip
        for pool in (cconv.max_pool2d, cconv.avg_pool2d):
            got = twin_of_arrays.to_numpy(pool(given, kernel, **options))
            np.testing.assert_allclose(got, pool(x, kernel, **options), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 11, 13), (1, 3, 40, 41), (3, 17, 1, 1), (5, 6, 7)])
def test_global_pools_reduce_each_map(twin_of_arrays, dtype, shape, normal):
    x = normal(shape, dtype)
    given, exact, to_numpy = twin_of_arrays.asarray(x), x.astype(np.float64), twin_of_arrays.to_numpy
    np.testing.assert_array_equal(to_numpy(cconv.global_max_pool2d(given)), exact.max(axis=(-2, -1), keepdims=True))
    mean, size = to_numpy(cconv.global_avg_pool2d(given)), np.abs(exact).mean(axis=(-2, -1), keepdims=True)
    assert (np.abs(mean - exact.mean(axis=(-2, -1), keepdims=True)) <= 2e-6 * size).all()


def test_a_global_average_of_equal_numbers_is_that_number(pools, twin_of_arrays):
    pools.test_a_global_average_of_equal_numbers_is_that_number(twin_of_arrays)


def test_every_activation_holds_on_the_whole_line(borrow, twin_of_arrays, activation, dtype):
    module = borrow("backends/test_activations.py")
    x = module.POINTS.astype(dtype).reshape(1, 1, 2, -1)
    got = twin_of_arrays.to_numpy(cconv.activate(twin_of_arrays.asarray(x), activation))
    module._assert_close(got, module._expected(x, activation), x, dtype)
    nan = cconv.activate(twin_of_arrays.asarray(np.full((1, 3, 5), np.nan, dtype)), activation)
    assert np.isnan(twin_of_arrays.to_numpy(nan)).all()


@pytest.mark.parametrize("groups", [1, 16])
def test_an_activation_has_the_same_bits_fused_or_apart(twin_of_arrays, activation, dtype, groups, normal):
    x, weight = (twin_of_arrays.asarray(normal(s, dtype)) for s in ((1, 16, 6, 7), (16, 16 // groups, 3, 3)))
    apart = cconv.activate(cconv.conv2d(x, weight, groups=groups), activation)
    fused = cconv.conv2d(x, weight, groups=groups, activation=activation)
    np.testing.assert_array_equal(*map(twin_of_arrays.to_numpy, (fused, apart)))


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 5000])
def test_sums_of_two_maps_are_exact(twin_of_arrays, dtype, size, whole):
    spec = PointwiseSpec(1, 1, size, True, as_activation("relu"), dtype)
    x, other = whole((3, 1, 1, size), dtype), whole((3, 1, 1, size), dtype)
    np.testing.assert_array_equal(_single(twin_of_arrays, spec, x, other), np.maximum(x + other, 0))


def test_pieces_lie_side_by_side_wherever_they_begin(twin_of_arrays, dtype, whole):
    """3, 4, 8 and 1 elements of each of two images: of none but the first is the place a vector's."""
    sizes, n = (3, 4, 8, 1), 2
    parts = [whole((n, 1, 1, size), dtype) for size in sizes]
    operations = tuple(
        plan.Operation(
            tensors.move((size,), (16,), [tensors.Axis(size, 1, 1)], at=sum(sizes[:i]), dtype=dtype), (i,), len(sizes)
        )
        for i, size in enumerate(sizes)
    )
    assert all(operation.spec.whole for operation in operations)
    inputs = {i: (1, 1, size) for i, size in enumerate(sizes)}
    made = plan.make(operations, inputs, (len(sizes),), twin_of_arrays.machine())
    got = twin_of_arrays.build(made, Weights({}.__getitem__)).run([twin_of_arrays.asarray(part) for part in parts])[0]
    want = np.concatenate(parts, axis=3).reshape(n, 16)
    np.testing.assert_array_equal(twin_of_arrays.to_numpy(got).reshape(n, 16), want)


def _single(twin, spec, *inputs) -> np.ndarray:
    """The result of one operator without weights."""
    program = twin.build(plan.single(spec, twin.machine()), Weights({}.__getitem__))
    return twin.to_numpy(program.run([twin.asarray(x) for x in inputs])[0])


def test_a_program_of_several_steps_keeps_its_maps_in_one_arena(twin_of_arrays, whole, dtype):
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
        for twin in (twin_of_arrays, cconv.backend.get("reference"))
    )
    assert made.plan.arena.size
    for images in (1, 4):
        x = whole((images, 3, 9, 10), dtype)
        got = twin_of_arrays.to_numpy(made.run([twin_of_arrays.asarray(x)])[0])
        np.testing.assert_array_equal(got, reference.run([x])[0])


def test_wide_softmax_and_lrn_agree_with_the_reference(twin_of_arrays, dtype, normal):
    for spec in (SoftmaxSpec(1000, 1, dtype), SoftmaxSpec(5, 300, dtype), LrnSpec(9, 40, 5, 0.3, 0.75, 1.5, dtype)):
        x = normal((3, *spec.image), dtype)
        got, want = (_single(twin, spec, x) for twin in (twin_of_arrays, cconv.backend.get("reference")))
        np.testing.assert_allclose(got, want, rtol=1e-5 if dtype == "float32" else 1e-13)
