"""The compiled kernels, ISA by ISA, below the public API: plans made for each instruction set that this processor runs.

In: machines forced to one ISA and thread count.  Out: equality with the reference, bit for bit on integer data.
"""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import cconv
from cconv import cpu, reference
from cconv.planning import plan, specs
from cconv.weights import Weights

ISAS = [name for name, usable, *_ in cpu.instruction_sets() if usable]


@pytest.fixture(params=ISAS)
def isa(request):
    return request.param


def integers(rng, shape, dtype):
    return rng.integers(-3, 4, shape).astype(dtype)


def run(twin, machine, spec, x, weight=None, bias=None, second=None):
    program = twin.build(plan.single(spec, machine), Weights(lambda _: (weight, bias)))
    return program.run([x] if second is None else [x, second])[0]


def both(isa, spec, x, weight=None, bias=None, second=None, threads=2):
    got = run(cpu, cpu.machine_of(isa, threads), spec, x, weight, bias, second)
    want = run(reference, reference.machine(), spec, x, weight, bias, second)
    return got, want


# The register tiles are 14x32, 6x16 and 4x8 (float32) and half as many channels in float64.
EDGES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 28, 29]


@pytest.mark.parametrize("width", EDGES)
def test_every_width_around_the_register_tile_is_exact(isa, dtype, width):
    rng = np.random.default_rng(width)
    x, w = integers(rng, (2, 5, 4, width), dtype), integers(rng, (17, 5, 3, 3), dtype)
    spec = specs.conv(x.shape[1:], w.shape, padding=1, dtype=dtype)
    got, want = both(isa, spec, x, w)
    assert np.array_equal(got, want)
    assert np.count_nonzero(got) > got.size / 2


@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65])
def test_every_number_of_outputs_around_the_panel_is_exact(isa, dtype, outputs):
    rng = np.random.default_rng(outputs)
    x, w = integers(rng, (1, 6, 9, 11), dtype), integers(rng, (outputs, 6, 3, 2), dtype)
    spec = specs.conv(x.shape[1:], w.shape, stride=(2, 1), padding=(0, 1, 2, 0), dtype=dtype)
    got, want = both(isa, spec, x, w)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("depth", [1, 15, 16, 95, 96, 97, 192, 193, 700])
def test_every_depth_around_the_chain_is_exact(isa, dtype, depth):
    rng = np.random.default_rng(depth)
    x, w = integers(rng, (1, depth, 3, 19), dtype), integers(rng, (20, depth, 1, 1), dtype)
    got, want = both(isa, specs.conv(x.shape[1:], w.shape, dtype=dtype), x, w)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("multiplier", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_groups_with_few_outputs_are_exact(isa, dtype, groups, multiplier, stride):
    rng = np.random.default_rng(groups)
    x, w = integers(rng, (2, 6, 13, 18), dtype), integers(rng, (groups * multiplier, 6 // groups, 3, 4), dtype)
    spec = specs.conv(x.shape[1:], w.shape, padding=(1, 2), stride=stride, groups=groups, dtype=dtype)
    got, want = both(isa, spec, x, w)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("images", [1, 3, 14, 15, 29])
def test_maps_of_one_pixel_are_exact_for_any_number_of_images(isa, dtype, images):
    rng = np.random.default_rng(images)
    x, w = integers(rng, (images, 4, 5, 3), dtype), integers(rng, (21, 4, 5, 3), dtype)
    bias, residual = integers(rng, 21, dtype), integers(rng, (images, 21, 1, 1), dtype)
    spec = specs.conv(x.shape[1:], w.shape, bias=True, residual=True, activation="relu", dtype=dtype)
    got, want = both(isa, spec, x, w, bias, residual)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("size", [(300, 3), (3, 300), (40, 257), (65, 64)])
def test_images_cut_into_several_tiles_are_exact(isa, dtype, size):
    rng = np.random.default_rng(1)
    x, w = integers(rng, (1, 3, *size), dtype), integers(rng, (9, 3, 3, 3), dtype)
    bias, residual = integers(rng, 9, dtype), integers(rng, (1, 9, *size), dtype)
    spec = specs.conv(x.shape[1:], w.shape, padding="same", bias=True, residual=True, dtype=dtype)
    got, want = both(isa, spec, x, w, bias, residual)
    assert np.array_equal(got, want)


def test_a_tile_that_outgrows_the_cache_is_cut_and_exact(isa):
    rng = np.random.default_rng(2)
    x, w = integers(rng, (1, 700, 6, 90), "float32"), integers(rng, (8, 700, 3, 3), "float32")
    got, want = both(isa, specs.conv(x.shape[1:], w.shape, padding=1), x, w)
    assert np.array_equal(got, want)


def test_every_activation_agrees_with_its_formula(isa, dtype, activation):
    x = np.linspace(-8, 8, 1001).astype(dtype).reshape(1, 1, 7, 143)
    got, want = both(isa, specs.pointwise(x.shape[1:], activation=activation, dtype=dtype), x)
    assert np.allclose(got, want, rtol=4 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)
    spec = specs.pointwise((1, 1, 3), activation=activation, dtype=dtype)
    nan, _ = both(isa, spec, np.full((1, 1, 1, 3), np.nan, dtype))
    assert np.isnan(nan).all()


#: Vectors take strides of 1 and 2; a dilated kernel may begin far beside the image.
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 2), {"stride": (2, 3), "padding": 1, "ceil_mode": True}),
        (3, {"stride": 1, "padding": 1}),
        (3, {"stride": 2, "padding": 1, "ceil_mode": True}),
        (2, {"stride": 2}),
        ((2, 5), {"stride": (1, 2), "padding": (0, 0, 1, 3)}),
        ((1, 3), {"stride": 1, "dilation": (1, 3), "padding": (0, 3)}),
        ((1, 3), {"stride": 1, "dilation": (1, 70), "padding": (0, 70)}),
    ],
)
@pytest.mark.parametrize("width", [5, 7, 8, 9, 16, 23, 40])
@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling_agrees_with_the_reference(isa, dtype, kind, width, kernel, options):
    rng = np.random.default_rng(width)
    x = integers(rng, (2, 3, 17, width), dtype)
    x[0, 1, 3, width // 2], x[1, 0, 5, 0] = np.nan, -np.inf
    spec = specs.pool(kind, x.shape[1:], kernel, **options, dtype=dtype)
    got, want = both(isa, spec, x)
    assert np.allclose(got, want, rtol=2 * np.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 48, 20, 20, 40, 3), (3, 8, 7, 7, 64, 5), (2, 12, 31, 9, 12, 3)])
def test_no_bit_depends_on_threads_batch_or_position(isa, dtype, shape):
    n, c, h, w, k, r = shape
    rng = np.random.default_rng(4)
    x, weight = rng.standard_normal((n, c, h, w)).astype(dtype), rng.standard_normal((k, c, r, r)).astype(dtype)
    spec = specs.conv(x.shape[1:], weight.shape, padding=r // 2, dtype=dtype)
    results = [run(cpu, cpu.machine_of(isa, threads), spec, x, weight) for threads in (1, 2, 3, 7)]
    for result in results[1:]:
        assert np.array_equal(result, results[0])
    alone = run(cpu, cpu.machine_of(isa, 2), spec, x[-1:], weight)
    assert np.array_equal(alone[0], results[0][-1])


def test_programs_for_other_sizes_share_the_packed_weights():
    weight = np.ones((8, 3, 3, 3), np.float32)
    weights = Weights(lambda _: (weight, None))
    for size in (8, 9, 10):
        spec = specs.conv((3, size, size), weight.shape)
        cpu.build(plan.single(spec, cpu.machine()), weights)
    assert weights.nbytes == 8 * 27 * 4


def test_an_isa_that_cannot_run_here_is_a_clear_error():
    with pytest.raises(cconv.BackendUnavailable, match=r"CCONV_ISA: expected one that this processor runs .*'mmx'"):
        cpu.machine_of("mmx", 1)


@pytest.mark.parametrize("name", ISAS)
def test_the_environment_forces_an_isa(name):
    script = "import cconv; print(cconv.show_config()['isa'])"
    environment = os.environ | {"CCONV_ISA": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name]


def test_a_wrong_environment_is_a_clear_error():
    script = "import numpy as np, cconv; cconv.conv2d(np.ones((1, 4, 4)), np.ones((1, 1, 2, 2)))"
    for variable, value in (("CCONV_ISA", "sse9"), ("CCONV_NUM_THREADS", "many")):
        environment = os.environ | {variable: value}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert variable in done.stderr.splitlines()[-1]
        assert value in done.stderr.splitlines()[-1]


FORK = """
import os, sys
import numpy as np, cconv
cconv.set_num_threads(2)
x, w = np.ones((1, 16, 64, 64), np.float32), np.ones((32, 16, 3, 3), np.float32)
want = cconv.conv2d(x, w)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(cconv.conv2d(x, w), want) else 1)
_, status = os.waitpid(child, 0)
assert np.array_equal(cconv.conv2d(x, w), want)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_after_a_parallel_run_computes_and_does_not_hang():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


def test_many_threads_calling_at_once_get_their_own_answers():
    rng = np.random.default_rng(5)
    layer = cconv.Conv2d(rng.standard_normal((32, 16, 3, 3)).astype(np.float32), padding=1)
    images = rng.standard_normal((8, 16, 40, 40)).astype(np.float32)
    want = [layer(image) for image in images]
    wrong = []

    def call(i):
        for _ in range(20):
            if not np.array_equal(layer(images[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
