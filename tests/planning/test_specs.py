"""Specs: frozen, hashable values for one image, in which every word of the user has become a number."""

import dataclasses
import pickle

import pytest

from cconv import ArgumentError, DTypeError, ShapeError
from cconv.planning import ACTIVATIONS, specs


def _conv(**options):
    return specs.conv((6, 10, 12), (8, 3, 3, 5), **({"groups": 2} | options))


def test_a_spec_is_a_frozen_value():
    spec = _conv(stride=2, padding="same", activation="relu")
    again = _conv(stride=(2, 2), padding=(0, 1, 1, 2), activation=("relu", 0))
    assert spec == again
    assert hash(spec) == hash(again)
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.C = 1


def test_it_holds_the_letters_of_the_field():
    spec = _conv(stride=(2, 3), padding=(1, 2), dilation=(2, 1))
    assert (spec.C, spec.H, spec.W, spec.K, spec.R, spec.S, spec.groups) == (6, 10, 12, 8, 3, 5, 2)
    assert spec.output == (8, spec.P, spec.Q) == (8, 4, 4)
    assert spec.depth == 3 * 3 * 5


def test_any_difference_makes_another_spec():
    different = [
        {}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"bias": True}, {"residual": True}, {"activation": "relu"},
        {"activation": "leaky_relu"}, {"activation": ("leaky_relu", 0.2)}, {"dtype": "float64"}, {"precision": "high"},
        {"algorithm": "direct"},
    ]  # fmt: skip
    assert len({_conv(**options) for options in different}) == len(different)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_known_by_name(name):
    assert _conv(activation=name).activation.name == name


def test_global_pooling_covers_the_map():
    spec = specs.adaptive_pool("average", (3, 7, 9), (1, 1))
    assert spec.output == (3, 1, 1)
    assert (spec.rows.start, spec.rows.stop, spec.columns.stop) == ((0,), (7,), (9,))


def test_a_pools_stride_defaults_to_its_kernel():
    assert specs.pool("max", (3, 8, 9), (2, 3)) == specs.pool("max", (3, 8, 9), (2, 3), stride=(2, 3))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: specs.conv((3, 8), (4, 3, 3, 3)), ShapeError),
        (lambda: specs.conv((3, 8, 8), (4, 2, 3, 3)), ShapeError),
        (lambda: specs.conv((3, 8, 8), (4, 3, 3, 3), groups=3), ShapeError),
        (lambda: specs.conv((3, 2, 8), (4, 3, 3, 3)), ShapeError),
        (lambda: specs.conv((3, 8, 8), (4, 3, 3, 3), dtype="int32"), DTypeError),
        (lambda: specs.conv((3, 8, 8), (4, 3, 3, 3), precision="best"), ArgumentError),
        (lambda: specs.pool("max", (3, 2, 2), 3), ShapeError),
        (lambda: specs.pool("max", (3, 8, 8), 2, padding=2), ShapeError),
        (lambda: specs.pointwise((3, 8, 8), activation="cube"), ArgumentError),
        (lambda: specs.adaptive_pool("max", (3, 8, 8), (0, 1)), ShapeError),
    ],
)
def test_what_cannot_be_is_refused(make, error):
    with pytest.raises(error, match="expected"):
        make()
