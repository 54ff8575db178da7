"""The filter banks and the texture model: each detector answers strongest to what it is named after."""

import numpy as np
import pytest

import cconv
from cconv import ModelError, filters
from cconv.model import load, texture

SIZE = 13  # the largest kernel
BANKS = ("edges", "blobs", "green_opponent", "blue_opponent", "gabor")


def _axes(size):
    axis = np.arange(size) - (size - 1) / 2
    return np.meshgrid(axis, axis)


def _grey(picture):
    return np.stack([picture] * 3).astype(np.float32)


def _step(angle, size=SIZE):
    """Dark, then bright towards the angle, with half of both on the line between."""
    x, y = _axes(size)
    along = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
    return _grey(np.clip(10 * np.round(along, 6) + 0.5, 0, 1))


def _disc(radius, size=SIZE):
    """A bright disc, its rim smooth: 8x8 samples per pixel."""
    axis = (np.arange(8 * size) + 0.5) / 8 - size / 2
    inside = np.add.outer(axis**2, axis**2) <= radius**2
    return _grey(inside.reshape(size, 8, size, 8).mean(axis=(1, 3)))


def _stripes(angle, odd, wavelength, size=SIZE):
    x, y = _axes(size)
    along = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
    return _grey((1 + (np.sin if odd else np.cos)(2 * np.pi * along / wavelength)) / 2)


def _uniform(channel):
    picture = np.zeros((3, SIZE, SIZE), np.float32)
    picture[channel] = 1
    return picture


def _patterns():
    """(bank, filter) -> the picture that its name promises, drawn without the filter's own formula."""
    made = {("edges", name): _step(angle) for name, angle in filters.EDGE_ANGLES.items()}
    for name, radius in filters.BLOB_RADII.items():
        made["blobs", f"bright-{name}"] = _disc(radius)
        made["blobs", f"dark-{name}"] = 1 - _disc(radius)
    for odd in (False, True):
        for i in range(filters.GABOR_ORIENTATIONS):
            angle = 180 * i / filters.GABOR_ORIENTATIONS
            made["gabor", f"{'odd' if odd else 'even'}-{angle:g}"] = _stripes(angle, odd, filters.GABOR_WAVELENGTH)
    made["green_opponent", "green"] = _uniform(1)
    made["blue_opponent", "blue"] = _uniform(2)
    return made


def _answer(weight, picture):
    """The filter's answer at the middle of the picture."""
    cut = (SIZE - weight.shape[-1]) // 2
    return cconv.conv2d(picture[:, cut : SIZE - cut, cut : SIZE - cut], weight[None])[0, 0, 0]


@pytest.fixture(scope="module")
def answers():
    """(filters, patterns) and the matrix of every filter's answer to every pattern."""
    patterns = _patterns()
    detectors = {
        (bank, name): w for bank in BANKS for name, w in zip(filters.labels(bank), filters.bank(bank), strict=True)
    }
    assert set(detectors) == set(patterns)
    order = sorted(patterns)
    return order, np.array([[_answer(detectors[f], patterns[p]) for p in order] for f in order])


def test_each_filter_answers_strongest_to_its_own_pattern(answers):
    order, matrix = answers
    for index, name in enumerate(order):
        others = np.delete(matrix[index], index)
        assert matrix[index, index] > 1.05 * others.max(), name


def test_each_pattern_is_answered_strongest_by_its_own_filter(answers):
    order, matrix = answers
    for index, name in enumerate(order):
        others = np.delete(matrix[:, index], index)
        assert matrix[index, index] > 1.02 * others.max(), name


@pytest.mark.parametrize("bank", filters.names())
def test_filters_are_balanced_and_normalised(bank):
    for weight in filters.bank(bank).astype(np.float64):
        assert abs(weight.sum()) < 1e-6
        assert abs(weight[weight > 0].sum() - 1) < 1e-6


@pytest.mark.parametrize("bank", filters.names())
def test_an_answer_is_at_most_one_and_only_for_the_filters_own_picture(bank, rng):
    weights = filters.bank(bank)
    for weight in weights:
        own = (weight > 0).astype(np.float32)
        assert abs((weight * own).sum() - 1) < 1e-5
    x = rng.random((20, *weights.shape[1:]), dtype=np.float32)
    assert abs(cconv.conv2d(x, weights)).max() < 1


@pytest.mark.parametrize("bank", filters.names())
def test_a_flat_picture_is_answered_by_nothing_but_a_colour_by_opponents(bank):
    grey = np.full((3, 20, 20), 0.7, np.float32)
    assert abs(cconv.conv2d(grey, filters.bank(bank))).max() < 1e-6


@pytest.mark.parametrize(("bank", "channel"), [("green_opponent", 1), ("blue_opponent", 2)])
def test_an_opponent_is_for_its_colour_against_the_others_and_blind_to_grey(bank, channel, rng):
    weight = filters.bank(bank)
    grey = _grey(rng.random((20, 20)))
    assert abs(cconv.conv2d(grey, weight)).max() < 1e-6
    signs = [np.sign(cconv.conv2d(_uniform(c), weight)).mean() for c in range(3)]
    assert signs == [1 if c == channel else -1 for c in range(3)]


def test_detectors_of_form_do_not_care_about_colour():
    for bank in ("edges", "blobs", "gabor"):
        weight = filters.bank(bank)
        assert np.array_equal(weight[:, 0], weight[:, 1])
        assert np.array_equal(weight[:, 1], weight[:, 2])


def test_the_banks_by_direction_make_up_the_bank_of_all_edges():
    parts = [name for bank in ("edges_vertical", "edges_horizontal", "edges_diagonal") for name in filters.labels(bank)]
    assert sorted(parts) == sorted(filters.labels("edges"))


@pytest.mark.parametrize("bank", filters.names())
def test_a_bank_is_also_a_model_of_one_layer(bank, normal):
    x, weight = normal((2, 3, 20, 24)), filters.bank(bank)
    np.testing.assert_array_equal(load(bank)(x), cconv.conv2d(x, weight))
    assert len(filters.labels(bank)) == len(weight)


def test_changing_a_bank_changes_no_later_one():
    filters.bank("edges")[:] = 0
    assert filters.bank("edges").any()


def test_an_unknown_bank_is_refused_with_the_known_names():
    with pytest.raises(ModelError, match=r"edges_vertical.*got 'edge'"):
        filters.bank("edge")


# The texture model: level 2 on pictures of what its filters are named after -------------------------------------------


def _texture_pattern(name, size=40):
    x, y = _axes(size)
    kind, _, rest = name.partition("-")
    if kind == "stripes":
        angle = {"vertical": 0, "rising": 45, "horizontal": 90, "falling": 135}[rest]
        return (_stripes(angle, True, 8, size) > 0.5).astype(np.float32)
    if kind == "corner":
        angle = np.radians(filters.EDGE_ANGLES[rest])
        return _grey((x * np.cos(angle) > 0) & (y * np.sin(angle) > 0))
    return _disc(3, size) if rest == "bright" else 1 - _disc(3, size)


def test_each_combination_answers_strongest_to_its_own_pattern():
    names = list(texture.combinations())
    model = load("texture")
    strongest = np.array(
        [model.run(_texture_pattern(name), ["level2.relu"])["level2.relu"].max((1, 2)) for name in names]
    )
    for index, name in enumerate(names):
        others = np.delete(strongest[:, index], index)
        assert strongest[index, index] > 1.02 * others.max(), name


def test_the_same_edges_everywhere_are_no_combination():
    for name, weight in texture.combinations().items():
        assert weight.sum() < 1e-9, name
        assert weight.max() > 0, name
