"""CUDA: tiles that a block can have, chains that keep the error bound, and the choice among them."""

from dataclasses import replace

import pytest

from cconv import ArgumentError
from cconv.planning import Machine, algorithm, cuda, plan, specs

GPU = Machine("sm_90", 16, 1, 1, (1,), threads=132, l2_bytes=50 << 20, device="cuda")
ITEMS = {"float32": 4, "float64": 2}  # of a vector of 16 bytes


def test_tiles_keep_what_the_kernel_assumes(dtype):
    for outputs, pixels, rows, columns in cuda.TILES[dtype]:
        threads = outputs // rows * (pixels // columns)
        assert pixels <= threads <= 1024
        assert cuda.STEP % (threads // pixels) == 0
        assert rows % ITEMS[dtype] == columns % ITEMS[dtype] == 0
        assert outputs % rows == pixels % columns == 0


@pytest.mark.parametrize("depth", [1, 8, 95, 96, 97, 9216, 10_000, 25088, 2**20])
def test_chains_are_whole_steps_and_no_longer_than_they_are_many(depth):
    products = cuda.chain(depth)
    assert products % cuda.STEP == 0
    assert products <= max(96, depth**0.5)
    assert -(-depth // products) <= max(96, 1.1 * depth**0.5)


def _chosen(image, weight, images=1, **options):
    spec = specs.conv(image, weight, **options)
    return plan.single(spec, GPU, images=images).steps[0].tiling


def test_a_large_layer_takes_a_large_tile_and_a_small_one_a_small_tile():
    large = _chosen((128, 56, 56), (128, 128, 3, 3), 32, padding=1)
    assert (large.outputs, large.pixels) == (128, 128)
    lecture = _chosen((100, 64, 64), (100, 100, 5, 5), 32, padding=2)
    assert (lecture.outputs, lecture.pixels) == (104, 128)
    small = _chosen((512, 1, 1), (1000, 512, 1, 1))
    assert small.outputs * small.pixels <= 64 * 32
    few = _chosen((64, 56, 56), (8, 64, 3, 3), 32, padding=1)
    assert few.outputs == 16


@pytest.mark.parametrize(
    ("weight", "options", "known"),
    [
        ((32, 1, 3, 3), {}, True),
        ((64, 1, 5, 5), {"stride": 2}, True),
        ((32, 1, 3, 5), {}, False),
        ((32, 1, 3, 3), {"dilation": 2}, False),
        ((32, 1, 3, 3), {"stride": 3}, False),
        ((32, 1, 9, 9), {}, False),
    ],
)
def test_depthwise_layers_take_strips(weight, options, known):
    tiling = _chosen((32, 20, 20), weight, groups=32, **options)
    assert isinstance(tiling, cuda.Strips)
    assert tiling.known == known


def test_many_outputs_of_one_input_are_a_product_of_matrices():
    assert isinstance(_chosen((4, 20, 20), (128, 1, 3, 3), groups=4), cuda.Ffma)


def test_executed_operations_count_the_padding():
    spec = specs.conv((5, 10, 10), (17, 5, 3, 3), padding=1)
    for tiling in cuda.candidates(spec):
        rows = -(-17 // tiling.outputs) * tiling.outputs
        assert tiling.executed_flops == 2 * rows * 100 * 48


def test_winograd_is_refused_and_unknown_names_too():
    for name, text in (("winograd", "on a GPU"), ("magic", "expected one of auto")):
        with pytest.raises(ArgumentError, match=text):
            algorithm.choose(specs.conv((32, 9, 9), (32, 32, 3, 3), algorithm=name), GPU)


def test_the_cpu_never_takes_a_tile_of_the_gpu():
    cpu = replace(GPU, device="cpu")
    spec = specs.conv((32, 9, 9), (32, 32, 3, 3))
    assert not any(isinstance(t, (cuda.Ffma, cuda.Strips)) for t in algorithm.candidates(spec, cpu))
