"""Cost: known answers by hand, exact integers of any size, costs that add; a function of shapes alone."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cconv import Cost, conv2d_cost, estimate
from cconv.planning import ACTIVATIONS, cost, specs

COUNTS = st.integers(0, 2**80)


@pytest.mark.parametrize(
    ("x", "weight", "options", "macs"),
    [
        ((1, 100, 64, 64), (100, 100, 5, 5), {"padding": 2}, 1_024_000_000),  # the lecture's layer
        ((10, 100, 64, 64), (100, 100, 5, 5), {"padding": 2}, 10_240_000_000),
        ((2, 3, 3), (3, 2, 2, 2), {}, 96),
        ((1, 3, 224, 224), (64, 3, 3, 3), {"padding": 1}, 86_704_128),  # VGG's first layer
        ((1, 512, 14, 14), (512, 512, 3, 3), {"padding": 1}, 462_422_016),
        ((1, 3, 224, 224), (64, 3, 7, 7), {"stride": 2, "padding": 3}, 118_013_952),  # ResNet's stem
        ((1, 96, 112, 112), (96, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 96}, 2_709_504),
        ((1, 9216, 1, 1), (4096, 9216, 1, 1), {}, 37_748_736),  # a dense layer
    ],
)
def test_known_macs(x, weight, options, macs):
    found = conv2d_cost(x, weight, **options)
    assert found.macs == macs
    assert found.flops == 2 * macs


def test_bias_residual_and_activation_are_other_flops():
    shapes = (2, 3, 8, 8), (5, 3, 3, 3)
    outputs = 2 * 5 * 6 * 6
    assert conv2d_cost(*shapes).flops_other == 0
    assert conv2d_cost(*shapes, bias=True).flops_other == outputs
    assert conv2d_cost(*shapes, residual=True).flops_other == outputs
    assert conv2d_cost(*shapes, activation="relu").flops_other == 0
    assert conv2d_cost(*shapes, bias=True, residual=True, activation="gelu").flops_other == 7 * outputs


def test_bytes_are_inputs_weights_and_outputs_once():
    elements = 2 * 3 * 8 * 8 + 5 * 3 * 3 * 3 + 2 * 5 * 6 * 6
    assert conv2d_cost((2, 3, 8, 8), (5, 3, 3, 3)).bytes == 4 * elements
    assert conv2d_cost((2, 3, 8, 8), (5, 3, 3, 3), bias=True).bytes == 4 * (elements + 5)
    assert conv2d_cost((2, 3, 8, 8), (5, 3, 3, 3), residual=True).bytes == 4 * (elements + 2 * 5 * 6 * 6)
    assert cost.of(specs.conv((3, 8, 8), (5, 3, 3, 3), dtype="float64"), 2).bytes == 8 * elements


def test_padding_counts_as_positions():
    """The bill is for the shape, whatever a clever kernel may skip."""
    assert conv2d_cost((1, 1, 1, 1), (1, 1, 3, 3), padding=1).macs == 9


def test_macs_do_not_depend_on_how_it_is_written():
    by_groups = conv2d_cost((1, 8, 9, 9), (8, 4, 3, 3), groups=2).macs
    assert by_groups == 2 * conv2d_cost((1, 4, 9, 9), (4, 4, 3, 3)).macs
    assert conv2d_cost((3, 9, 9), (4, 3, 3, 3)) == conv2d_cost((1, 3, 9, 9), (4, 3, 3, 3))


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pools_count_additions_and_divisions(kind):
    spec = specs.pool(kind, (5, 8, 8), 2)
    found = cost.of(spec, 3)
    assert found.macs == 0
    assert found.flops_other == (3 * 5 * 4 * 4 * 4 if kind == "average" else 0)
    assert found.bytes == 4 * 3 * 5 * (64 + 16)


def test_every_activation_has_a_rule():
    assert set(cost.ACTIVATION_FLOPS) == set(ACTIVATIONS)
    for name, flops in cost.ACTIVATION_FLOPS.items():
        assert cost.of(specs.pointwise((3, 4, 5), activation=name), 2).flops_other == 120 * flops
    assert cost.of(specs.pointwise((3, 4, 5), add=True, activation="tanh"), 1).flops_other == 60 + 60


def test_a_batch_norm_is_two_per_element():
    assert cost.batch_norm(1000, 10, "float32") == Cost(0, 2000, 4 * 2020)


@given(COUNTS, COUNTS, COUNTS, st.integers(0, 2**40))
def test_costs_add_and_multiply_exactly_at_any_size(macs, other, moved, times):
    one = Cost(macs, other, moved)
    assert one + Cost(1, 2, 3) == Cost(macs + 1, other + 2, moved + 3)
    assert one * times == times * one == Cost(macs * times, other * times, moved * times)
    assert sum([one, one, one]) == one * 3
    assert one.as_dict() == {"macs": macs, "flops": 2 * macs, "flops_other": other, "bytes": moved}
    assert all(type(v) is int for v in (one * times).as_dict().values())


def test_a_cost_is_a_frozen_value():
    assert hash(Cost(1, 2, 3)) == hash(Cost(1, 2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cost().macs = 1
    with pytest.raises(TypeError):
        Cost(1) + 1
    with pytest.raises(TypeError):
        Cost(1) * 1.5


@given(n=st.integers(1, 2**40))
def test_a_batch_costs_n_times_an_image_but_reads_the_weights_once(n):
    one, many = (conv2d_cost((k, 3, 9, 9), (4, 3, 3, 3), bias=True, activation="silu") for k in (1, n))
    assert (many.macs, many.flops_other) == (n * one.macs, n * one.flops_other)
    assert many.bytes == n * one.bytes - (n - 1) * 4 * (4 * 27 + 4)


class TestEstimate:
    """The lecture: ten 100 -> 100 5x5 layers on 64x64, a million samples, on two processors."""

    TEN = conv2d_cost((1, 100, 64, 64), (100, 100, 5, 5), padding=2) * 10

    def test_the_whole_is_10_peta_macs(self):
        assert (self.TEN * 1_000_000).macs == 10_240_000_000_000_000

    @pytest.mark.parametrize(
        ("rate", "seconds"),
        [
            ({"macs_per_s": 0.15e12}, 18.963 * 3600),
            ({"macs_per_s": 12e12}, 14.222 * 60),
            ({"flops_per_s": 0.15e12}, 37.926 * 3600),
            ({"flops_per_s": 12e12}, 28.444 * 60),
        ],
        ids=str,
    )
    def test_its_times(self, rate, seconds):
        assert estimate(self.TEN, 1_000_000, **rate) == pytest.approx(seconds, rel=1e-4)

    def test_counting_flops_takes_twice_as_long_at_the_same_rate(self):
        assert estimate(self.TEN, flops_per_s=1e9) == 2 * estimate(self.TEN, macs_per_s=1e9)

    def test_no_samples_take_no_time(self):
        assert estimate(self.TEN, 0, macs_per_s=1) == 0

    def test_a_count_beyond_64_bits_is_divided_not_overflowed(self):
        assert estimate(Cost(2**100), 2**20, macs_per_s=2.0**60) == 2.0**60
