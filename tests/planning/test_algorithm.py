"""Algorithm: a tiling covers the output, holds the input it reads, and sums alike whatever the number of threads."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cconv import ArgumentError
from cconv.planning import Depthwise, Direct, Machine, Winograd, algorithm, cost, direct, specs, winograd

WIDE = (8, 8, 8, 6, 5, 4, 3, 3, 3, *5 * (2,), *14 * (1,))
MACHINES = (
    Machine(
        "wide",
        vector_bytes=64,
        tile_rows=14,
        tile_vectors=2,
        pixel_vectors=WIDE,
        threads=4,
        l2_bytes=1 << 20,
        kept=15,
    ),
    Machine(
        "middle",
        vector_bytes=32,
        tile_rows=6,
        tile_vectors=2,
        pixel_vectors=(6, 6, 4, 3, 2, 2, 1),
        threads=16,
        l2_bytes=1 << 18,
    ),
    Machine("narrow", vector_bytes=16, tile_rows=1, tile_vectors=1, pixel_vectors=(1,), threads=1, l2_bytes=1 << 14),
)


@st.composite
def convolutions(draw):
    groups, depth = draw(st.sampled_from([1, 1, 2, 3, 32])), draw(st.integers(1, 600))
    kernel = draw(st.tuples(*[st.integers(1, 11)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2))
    image = [d * (k - 1) + 1 + draw(st.integers(0, 300)) for k, d in zip(kernel, dilation, strict=True)]
    return specs.conv(
        (groups * depth, *image), (groups * draw(st.integers(1, 200)), depth, *kernel),
        groups=groups, dilation=dilation,
        stride=draw(st.tuples(*[st.integers(1, 5)] * 2)), padding=draw(st.tuples(*[st.integers(0, 5)] * 4)),
        dtype=draw(st.sampled_from(sorted(specs.ITEMSIZE))),
    )  # fmt: skip


@st.composite
def squares(draw):
    """Those that Winograd may compute, few of which are among any."""
    size, depth = draw(st.sampled_from([3, 3, 5])), draw(st.integers(16, 600))
    image = [size + draw(st.integers(0, 60)) for _ in range(2)]
    return specs.conv(
        (depth, *image), (draw(st.integers(16, 600)), depth, size, size), stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)), dtype=draw(st.sampled_from(sorted(specs.ITEMSIZE))),
    )  # fmt: skip


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.isa)
@settings(max_examples=200)
@given(spec=convolutions())
def test_tiles_cover_the_output_and_none_is_empty(machine, spec):
    for lanes in ("channels", "pixels"):
        _covers(spec, direct.tiling(spec, machine, lanes))


def _covers(spec, tiling):
    if not tiling.across_images:
        height, width = (1, spec.P * spec.Q) if tiling.flat else (spec.P, spec.Q)
        assert 1 <= tiling.tile_p <= height
        assert 1 <= tiling.tile_q <= width
    assert 1 <= tiling.channel_parts <= max(spec.groups, spec.K)
    assert 1 <= tiling.chains <= spec.depth
    assert 1 <= tiling.panels <= spec.K // spec.groups


def test_planning_takes_no_longer_for_more_groups(monkeypatch):
    cuts = []
    monkeypatch.setattr(direct, "ceil_div", lambda a, b: cuts.append(a) or -(-a // b))
    for groups in (1000, 100_000):
        spec = specs.conv((2 * groups, 4, 4), (groups, 2, 3, 3), padding=1, groups=groups)
        direct.tiling(spec, MACHINES[0], "pixels")
    assert len(cuts) < 2000


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.isa)
@settings(max_examples=200)
@given(spec=convolutions())
def test_a_tile_of_input_holds_every_element_that_its_outputs_read(machine, spec):
    tiling = direct.tiling(spec, machine, "pixels")
    kernel, steps = (spec.R, spec.S), zip(spec.stride, spec.dilation, strict=True)
    axes = zip(kernel, steps, (tiling.rows, tiling.columns), (tiling.tile_p, tiling.tile_q), strict=True)
    for taps, (stride, dilation), axis, outputs in [] if tiling.across_images else axes:
        assert len(axis.taps) == taps
        for tap, (block, place) in enumerate(axis.taps):
            # Place i of a block holds input starts[block] + i * stride: output o of this tap reads o further.
            assert axis.starts[block] + place * stride == tap * dilation
            assert place + outputs <= axis.extent + axis.shared
        assert axis.size <= taps * outputs
    assert tiling.plane == tiling.rows.size * tiling.columns.size + tiling.columns.shared
    assert tiling.rows.shared == 0


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.isa)
@settings(max_examples=200)
@given(spec=convolutions())
def test_what_two_rows_of_a_tile_share_is_padding_of_both(machine, spec):
    for lanes in ("channels", "pixels"):
        tiling = direct.tiling(spec, machine, lanes)
        columns = tiling.columns
        if columns.shared:
            assert (tiling.joined, lanes, tiling.tile_q, columns.starts) == (True, "pixels", spec.Q, (0,))
            # Elements from `extent` on are the right ones of a row, and its left ones from 0 on those of the next.
            assert columns.extent - spec.padding[1] >= spec.W
            assert columns.shared <= spec.padding[1]


def test_joined_rows_have_one_column_of_padding_between_them():
    grouped = specs.conv((256, 28, 28), (256, 8, 3, 3), padding=1, groups=32)
    tiling = direct.tiling(grouped, MACHINES[0], "pixels")
    assert (tiling.tile_p, tiling.joined, tiling.pitch) == (14, True, 29)
    # 14 rows of 29, but for the last gap, are 26 vectors.
    assert tiling.executed_flops == 2 * 2 * 26 * 16 * 256 * grouped.depth
    at, before = tiling.gaps(16)
    assert at[26:30] == [26, 27, 29, 30]
    assert (*before[:3], before[26]) == (0, 16, 31, 14 * 28)


@pytest.mark.parametrize("dilation", [1, 7, 100, 30_000, 2**29])
def test_a_tile_does_not_grow_with_dilation(dilation):
    spec = specs.conv((4, 2, 2), (8, 4, 3, 3), padding=dilation, dilation=dilation)
    for machine in MACHINES:
        tiling = direct.tiling(spec, machine, "pixels")
        assert tiling.plane <= 9 * tiling.tile_p * tiling.tile_q


def test_an_odd_layer_gets_a_small_tile():
    deep = specs.conv((1 << 20, 40, 40), (32, 1 << 20, 3, 3), padding=1)
    dense = specs.conv((1 << 22, 1, 1), (1000, 1 << 22, 1, 1))
    pointwise = specs.conv((1 << 20, 9, 9), (32, 1 << 20, 1, 1))
    for machine in MACHINES:
        for lanes in ("channels", "pixels"):
            tiling = direct.tiling(pointwise, machine, lanes)
            # A piece of the channels of a tile, or a tile, of 4 MB for every pixel.
            assert tiling.tile_p * tiling.tile_q <= 16 * tiling.pieces
        tiling = direct.tiling(deep, machine, "channels")
        assert (tiling.tile_p, tiling.tile_q) == (1, min(tiling.tile_q, 3))
        assert direct.tiling(dense, machine, "channels").tile_q == min(4, machine.tile_rows)


@given(spec=convolutions() | squares(), threads=st.integers(1, 64))
def test_the_order_of_the_sum_does_not_depend_on_the_number_of_threads(spec, threads):
    """And direct weights are packed once for all of them."""
    for machine in MACHINES:
        tilings, others = (algorithm.candidates(spec, m) for m in (machine, replace(machine, threads=threads)))
        for tiling, other in zip(tilings, others, strict=True):
            assert tiling.label == other.label
            assert tiling.packing == other.packing or isinstance(tiling, Winograd)
            assert getattr(tiling, "chains", 1) == getattr(other, "chains", 1)


@given(spec=convolutions() | squares(), threads=st.integers(1, 64))
def test_the_choice_does_not_depend_on_the_number_of_threads(spec, threads):
    for machine in MACHINES:
        chosen, other = (algorithm.choose(spec, m) for m in (machine, replace(machine, threads=threads)))
        assert chosen.label == other.label


def test_lanes_of_pixels_read_images_where_they_lie_unless_they_come_from_memory():
    spec = specs.conv((256, 56, 56), (64, 256, 1, 1))
    wide = next(m for m in MACHINES if m.vector_bytes == 64)
    found = [direct.tiling(spec, wide, "pixels", images) for images in (1, 2, 8)]
    assert [tiling.in_place for tiling in found] == [True, True, False]


@pytest.mark.parametrize(
    ("image", "weight", "stride"),
    [((8, 13, 14), (8, 1, 7, 7), 2), ((64, 4, 2), (2048, 1, 5, 5), 1), ((128, 3, 5), (128, 1, 5, 5), 2)],
)
def test_direct_sums_in_one_order_whatever_the_batch_and_whoever_packs(image, weight, stride):
    """Layers that depthwise or other kernels could compute: their sums differ in the last bits."""
    spec = specs.conv(image, weight, stride=stride, padding=weight[2] // 2, groups=image[0], algorithm="direct")
    for machine in MACHINES:
        asked = [(images, packs) for images in (1, 2, 8, 32) for packs in (False, True)]
        assert len({type(algorithm.choose(spec, machine, *one)) for one in asked}) == 1


@pytest.mark.parametrize(
    ("weight", "options", "own"),
    [
        ((8, 1, 3, 3), {"padding": 1}, True),
        ((24, 1, 5, 5), {"padding": 2, "stride": 2}, True),
        ((32, 1, 3, 3), {"padding": 1}, False),
        ((8, 1, 7, 7), {"padding": 3}, False),
        ((8, 1, 3, 5), {}, False),
        ((8, 1, 3, 3), {"padding": 2}, False),
        ((8, 1, 3, 3), {"padding": 1, "stride": (1, 2)}, False),
        ((8, 1, 3, 3), {"dilation": 2}, False),
    ],
)
def test_depthwise_kernels_are_taken_where_they_were_measured_to_be_faster(weight, options, own):
    spec = specs.conv((8, 14, 14), weight, groups=8, **options)
    for machine in MACHINES:
        assert {isinstance(tiling, Depthwise) for tiling in algorithm.candidates(spec, machine)} == {own}


@given(spec=convolutions())
def test_direct_kernels_issue_at_least_what_is_billed(spec):
    for machine in MACHINES:
        for tiling in algorithm.candidates(spec, machine):
            assert tiling.algorithm == "winograd" or tiling.executed_flops >= cost.of(spec).flops


def test_whole_vectors_issue_exactly_what_is_billed():
    spec = specs.conv((64, 64, 64), (64, 64, 3, 3), padding=1)
    for lanes in ("channels", "pixels"):
        assert direct.tiling(spec, MACHINES[0], lanes).executed_flops == cost.of(spec).flops


def test_winograd_issues_fewer_multiplications():
    spec = specs.conv((64, 56, 56), (64, 64, 3, 3), padding=1)
    tilings = [t for t in algorithm.candidates(spec, MACHINES[0]) if isinstance(t, Winograd)]
    assert len(tilings) >= 2
    for tiling in tilings:
        rows, columns = tiling.rows, tiling.columns
        fewer = tiling.points / (rows.m * rows.r * columns.m * columns.r)
        assert tiling.executed_flops < cost.of(spec).flops * 1.3 * fewer


@pytest.mark.parametrize(
    ("image", "weight", "options", "tiles", "products"),
    [
        ((64, 56, 56), (64, 64, 3, 3), {"padding": 1, "stride": 2}, 7 * 7, (9 * 9) / (4 * 4 * 9)),
        ((64, 56, 56), (64, 64, 5, 5), {"padding": 2, "stride": 2}, 7 * 7, (11 * 11) / (4 * 4 * 25)),
        ((256, 28, 28), (256, 256, 3, 3), {"padding": 2, "dilation": 2}, 4 * 4 * 4, (6 * 6) / (4 * 4 * 9)),
    ],
)
def test_stride_and_dilation_have_transforms_too(image, weight, options, tiles, products):
    spec = specs.conv(image, weight, **options)
    for machine in MACHINES[:2]:
        found = {t.rows.m: t for t in algorithm.candidates(spec, machine) if isinstance(t, Winograd)}
        assert found[4].count(spec) == tiles
        assert found[4].points * tiles == pytest.approx(products * spec.depth / spec.C * tiles * 16)
        assert algorithm.choose(spec, machine).algorithm == "winograd"


def test_packed_filters_of_another_stride_are_not_taken_for_these():
    """Two layers of a network may share a weight."""
    for machine in MACHINES[:2]:
        packings = [
            {t.packing for t in algorithm.candidates(spec, machine) if isinstance(t, Winograd)}
            for stride in (1, 2)
            for spec in [specs.conv((64, 28 * stride, 28 * stride), (64, 64, 3, 3), padding=1, stride=stride)]
        ]
        assert packings[0]
        assert packings[1]
        assert not packings[0] & packings[1]


@pytest.mark.parametrize("threads", [1, 2, 5, 8])
def test_threads_share_a_single_block_and_transform_its_filters_if_they_serve_one_run(threads):
    singles = 0
    for size, packs in itertools.product((7, 14, 28), (False, True)):
        spec = specs.conv((512, size, size), (512, 512, 3, 3), padding=1)
        for machine in MACHINES:
            for tiling in algorithm.candidates(spec, replace(machine, threads=threads), 1, packs):
                single = isinstance(tiling, Winograd) and tiling.held > 0 and tiling.tiles == tiling.count(spec)
                assert not single or tiling.group <= -(-tiling.panels // threads)
                assert getattr(tiling, "fused", False) == (packs and single)
                singles += single
    assert singles


def test_each_of_two_threads_has_as_many_panels_of_a_single_block():
    """Where one thread alone has three: two and one took 1.1 times as long as two and two of fewer outputs."""
    spec = specs.conv((512, 14, 14), (32, 512, 3, 3), padding=1)
    alone, two = (algorithm.choose(spec, replace(MACHINES[0], threads=threads)) for threads in (1, 2))
    assert (alone.lanes, alone.panels) == ("pixels", 3)
    assert (two.lanes, two.panels, two.group) == ("pixels", 4, 2)


def test_the_lectures_layer_takes_tiles_that_are_not_square():
    spec = specs.conv((100, 64, 64), (100, 100, 5, 5), padding=2)
    for machine in MACHINES[:2]:
        tiling = algorithm.choose(spec, machine)
        assert (tiling.label, tiling.points, tiling.count(spec)) == ("winograd 3x4x5", 56, 22 * 16)


def test_labels_are_distinct():
    for size, stride in winograd.TILES:
        spec = specs.conv((64, 64, 64), (64, 64, size, size), padding=2, stride=stride, precision="high")
        labels = [t.label for t in algorithm.candidates(spec, MACHINES[0]) if isinstance(t, Winograd)]
        assert len(set(labels)) == len(labels) == len(winograd.TILES[size, stride])
        assert f"winograd 2x{size}" in labels


@pytest.mark.parametrize(
    ("image", "weight", "options"),
    [
        ((15, 30, 30), (64, 15, 3, 3), {}),
        ((64, 30, 30), (15, 64, 3, 3), {}),
        ((64, 30, 30), (64, 64, 3, 3), {"stride": 3}),
        ((64, 30, 30), (64, 64, 3, 3), {"stride": (1, 2)}),
        ((64, 30, 30), (64, 64, 7, 7), {"stride": 2}),
        ((64, 30, 30), (64, 64, 3, 3), {"stride": 2, "dilation": 2}),
        ((64, 30, 30), (64, 64, 3, 3), {"dilation": (1, 12)}),
        ((64, 30, 30), (64, 32, 3, 3), {"groups": 2}),
        ((64, 30, 30), (64, 64, 3, 5), {}),
        ((64, 30, 30), (64, 64, 3, 3), {"algorithm": "direct"}),
    ],
)
def test_winograd_stays_away_from_few_channels_and_other_geometries(image, weight, options):
    for machine in MACHINES:
        for tiling in algorithm.candidates(specs.conv(image, weight, **options), machine):
            assert tiling.algorithm == "direct"


def test_an_unknown_algorithm_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ArgumentError, match=r"auto, direct, winograd.*'guess'"):
        algorithm.choose(specs.conv((3, 8, 8), (4, 3, 3, 3), algorithm="guess"), MACHINES[0])


def test_winograd_where_it_cannot_be_is_an_error_that_says_why():
    with pytest.raises(ArgumentError, match=r"algorithm: expected a kernel of 3x3, 5x5 or 7x7.*got 1x1"):
        algorithm.choose(specs.conv((3, 8, 8), (4, 3, 1, 1), algorithm="winograd"), MACHINES[0])


@pytest.mark.parametrize("name", algorithm.ALGORITHMS)
def test_every_algorithm_that_is_listed_can_be_chosen(name):
    tiling = algorithm.choose(specs.conv((3, 8, 8), (4, 3, 3, 3), algorithm=name), MACHINES[0])
    assert isinstance(tiling, Winograd if name == "winograd" else Direct)
