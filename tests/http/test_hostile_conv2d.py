"""Hostile conv2d: tensors that do not fit each other and options that cannot be, some of which ask for a giant result.

In: JSON for /v1/conv2d of a service with a ledger.  Out: 400 or 413 with a text, no row, and little memory.
"""

import tracemalloc

import pytest

ledger = pytest.importorskip("cconv.ledger", reason="the ledger's packages are not installed")
pytest.importorskip("sqlalchemy", reason="the ledger's packages are not installed")


def zeros(*shape: int) -> list:
    return [zeros(*shape[1:]) if shape[1:] else 0.0 for _ in range(shape[0])]


GOOD = {"x": zeros(1, 4, 5, 5), "weight": zeros(6, 4, 3, 3), "bias": zeros(6), "padding": 1}
CASES = {
    "x_missing": {"x": None},
    "weight_missing": {"weight": None},
    "x_number": {"x": 1.0},
    "x_empty": {"x": []},
    "x_of_empty": {"x": [[[]]]},
    "x_of_no_images": {"x": zeros(0, 4, 5, 5)},
    "x_of_1_axis": {"x": zeros(4)},
    "x_of_2_axes": {"x": zeros(4, 5)},
    "x_of_5_axes": {"x": zeros(1, 1, 4, 5, 5)},
    "x_of_other_channels": {"x": zeros(1, 3, 5, 5)},
    "weight_of_3_axes": {"weight": zeros(4, 3, 3)},
    "weight_of_5_axes": {"weight": zeros(1, 6, 4, 3, 3)},
    "weight_larger_than_x": {"weight": zeros(6, 4, 8, 8)},
    "bias_short": {"bias": zeros(5)},
    "bias_long": {"bias": zeros(7)},
    "bias_of_images": {"bias": zeros(1, 6, 5, 5)},
    "bias_number": {"bias": 0.5},
    "stride_zero": {"stride": 0},
    "stride_negative": {"stride": -1},
    "stride_of_three": {"stride": [1, 1, 1]},
    "stride_fraction": {"stride": 1.5},
    "stride_text": {"stride": "fast"},
    "stride_boolean": {"stride": True},
    "stride_2_63": {"stride": 2**63},
    "stride_2_64": {"stride": 2**64},
    "padding_negative": {"padding": -1},
    "padding_text": {"padding": "full"},
    "padding_of_three": {"padding": [1, 1, 1]},
    "padding_of_five": {"padding": [1, 1, 1, 1, 1]},
    "padding_output_bomb": {"padding": 30_000},
    "padding_2_31": {"padding": 2**31 - 1},
    "padding_object": {"padding": {"top": 1}},
    "dilation_zero": {"dilation": 0},
    "dilation_negative": {"dilation": -1},
    "dilation_beyond_x": {"dilation": 9},
    "dilation_2_62": {"dilation": 2**62},
    "groups_zero": {"groups": 0},
    "groups_negative": {"groups": -1},
    "groups_that_do_not_divide": {"groups": 3},
    "groups_beyond_channels": {"groups": 8},
    "groups_text": {"groups": "depthwise"},
    "activation_unknown": {"activation": "mish"},
    "activation_with_nonsense": {"activation": "leaky_relu,steep"},
    "activation_long": {"activation": "r" * 10_000},
    "precision_unknown": {"precision": "exact"},
    "algorithm_unknown": {"algorithm": "magic"},
    "algorithm_that_cannot": {"algorithm": "winograd", "stride": 4},
    "dtype_unknown": {"dtype": "float128"},
    "dtype_object": {"dtype": {"a": 1}},
    "option_unknown": {"colour": "blue"},
    "option_of_python": {"__class__": "x"},
}


#: What could be, and is more than one request may ask for.
TOO_LARGE = {"stride_2_63", "padding_output_bomb", "padding_2_31", "dilation_2_62"}


@pytest.fixture
def client(make_app, tmp_path):
    url = f"sqlite:///{tmp_path}/usage.db"
    ledger.migrate(url)
    return make_app(ledger=url).test_client()


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_is_refused_and_not_billed(client, name):
    client.get("/livez")
    tracemalloc.start()
    answer = client.post("/v1/conv2d?format=json", json={**GOOD, **CASES[name]})
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.status_code == (413 if name in TOO_LARGE else 400)
    assert isinstance(answer.json["error"], str)
    assert 10 < len(answer.json["error"]) < 1000
    assert most < 20_000_000
    assert client.get("/livez").status_code == 200
    assert client.get("/v1/usage?by=event").json == []


def test_what_they_were_made_of_is_good(client):
    assert client.post("/v1/conv2d?format=json", json=GOOD).status_code == 200
    assert len(client.get("/v1/usage?by=event").json) == 1
