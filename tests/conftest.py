"""Conftest: what the tests of the library share: the axes (backend, then dtype, then case), data, oracle and bound.

In: tests/cases.py and the twins that work on this machine.  Out: parameters and fixtures; every fixture that is a
function is made once per session, so that Hypothesis may use it too.

`twin` is every implementation that works here; `backend` leaves out the reference, which is the oracle.
"""

import importlib.util
import os
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import cconv
from cconv import backend as backends
from cconv.planning import plan, specs
from cconv.weights import Weights

hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("reproducible")

DTYPES = ("float32", "float64")


def _load(name: str):
    """A file beside this one by its path: under --import-mode=importlib test files cannot import each other by name."""
    spec = importlib.util.spec_from_file_location(f"cconv_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = _load("cases").CASES
TWINS = tuple(backends.get(name) for name, reason in backends.available().items() if not reason)

#: Outermost first: a failing backend reads as one block.
AXES = {
    "twin": (TWINS, lambda twin: twin.name),
    "backend": (tuple(twin for twin in TWINS if twin.name != "reference"), lambda twin: twin.name),
    "dtype": (DTYPES, str),
    "case": (CASES, lambda case: case.name),
    "activation": (tuple(specs.ACTIVATIONS), str),
}


def pytest_addoption(parser):
    parser.addoption("--cconv-from", help="the folder from which cconv must have been imported")
    parser.addoption("--need-postgresql", action="store_true", help="fail, not skip, where PostgreSQL is missing")
    parser.addoption("--one-in", type=int, default=1, help="of the generated layers, run only every so many-th")
    parser.addoption("--need-compilers", action="store_true", help="fail, not skip, where g++ or NVRTC is missing")
    parser.addoption("--sanitize", action="store_true", help="compile GPU kernels for the host with AddressSanitizer")


def pytest_collection_modifyitems(items):
    """Whatever needs the server is marked, so that it can be left out by name."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "postgresql" in parameters.values() or {"postgres", "postgres_url"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("postgresql")


@pytest.fixture(scope="session")
def postgres(request):
    """A PostgreSQL server; without one the test skips, or fails where it is needed."""
    yield from _load("postgresql").server_or_skip(request.config.getoption("--need-postgresql"))


def pytest_generate_tests(metafunc):
    for name, (values, label) in AXES.items():
        if name in metafunc.fixturenames:
            chosen = [
                pytest.param(value, marks=pytest.mark.gpu) if getattr(value, "name", None) == "gpu" else value
                for value in values
            ]
            metafunc.parametrize(name, chosen, ids=label)


def pytest_configure():
    """Memory of CuPy's pool is all one to compute-sanitizer, which would see no index that leaves an array."""
    if os.environ.get("CCONV_TEST_NO_POOL") == "1":
        import cupy

        cupy.cuda.set_allocator(None)


def pytest_report_header():
    reasons = backends.available()
    return "cconv: " + ", ".join(
        f"{name} ({reason or backends.get(name).machine()})" for name, reason in reasons.items()
    )


@pytest.fixture
def rng(request):
    """A generator seeded by the test's own name: the same data in any order and any selection."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def whole(rng):
    """f(shape, dtype): small integers, so that every partial sum of a convolution is exact in float32."""
    return lambda shape, dtype="float32", reach=8: rng.integers(-reach, reach + 1, shape).astype(dtype)


@pytest.fixture
def normal(rng):
    """f(shape, dtype): zero-mean data."""
    return lambda shape, dtype="float32": rng.standard_normal(shape).astype(dtype)


def _spec(x, weight, bias, residual, options):
    return specs.conv(
        x.shape[1:], weight.shape, bias=bias is not None, residual=residual is not None, dtype=x.dtype.name, **options
    )


def _oracle(x, weight, bias=None, residual=None, **options):
    twin = backends.get("reference")
    program = twin.build(
        plan.single(_spec(x, weight, bias, residual, options), twin.machine()), Weights(lambda _: (weight, bias))
    )
    return program.run([x] if residual is None else [x, residual])[0]


def _convolve(twin, x, weight, bias=None, residual=None, **options):
    if twin.name == "reference":
        return _oracle(x, weight, bias, residual, **options)
    x, weight, bias, residual = (None if a is None else twin.asarray(a) for a in (x, weight, bias, residual))
    return twin.to_numpy(cconv.conv2d(x, weight, bias, residual=residual, **options))


@pytest.fixture(scope="session")
def oracle():
    """f(x, weight, bias, residual, **options): the convolution in float64, by the reference twin."""
    return _oracle


@pytest.fixture(scope="session")
def convolve():
    """f(twin, x, weight, bias, residual, **options): NumPy in, NumPy out, computed by that twin."""
    return _convolve


def _by_definition(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """The convolution by windows of the padded image: shares no code with cconv, exact on integers."""

    def pair(value):
        return value if isinstance(value, tuple) else (value, value)

    stride, dilation, size, kernel = pair(stride), pair(dilation), x.shape[2:], weight.shape[2:]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        lacking = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, stride, reach, strict=True)]
        sides = [(lack // 2, lack - lack // 2) for lack in lacking]
    elif padding == "valid":
        sides = [(0, 0), (0, 0)]
    elif isinstance(padding, tuple) and len(padding) == 4:
        sides = [(padding[0], padding[2]), (padding[1], padding[3])]
    else:
        sides = [(p, p) for p in pair(padding)]
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *sides])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    parts = [
        np.tensordot(channels, filters, ([1, 4, 5], [1, 2, 3])).transpose(0, 3, 1, 2)
        for channels, filters in zip(
            np.split(windows, groups, axis=1), np.split(weight.astype(np.float64), groups), strict=True
        )
    ]
    return np.concatenate(parts, axis=1)


@pytest.fixture(scope="session")
def by_definition():
    """f(x, weight, stride, padding, dilation, groups): what conv2d must give, to the last digit on integers."""
    return _by_definition


def _assert_within_bound(got, x, weight, bias=None, residual=None, *, zero_mean=False, other=None, **options):
    """docs/api.md's bound: per image, of the result itself for zero-mean data, of conv(|x|, |weight|) for any data.

    `other` is what another device gave: the two may be twice as far apart as each may be from the exact result.
    """
    exact = _oracle(x, weight, bias, residual, **options)
    if zero_mean:
        scale = exact
    else:
        scale = _oracle(*(None if a is None else np.abs(a) for a in (x, weight, bias, residual)), **options)
    factor = max(1.0, np.sqrt(np.prod(weight.shape[1:]) / 2304)) * (2.0**-29 if x.dtype == np.float64 else 1.0)
    if other is not None:
        exact, factor = other, 2 * factor
    error = np.abs(got.astype(np.float64) - exact)
    for image, (e, s) in enumerate(zip(error, scale, strict=True)):
        size = np.linalg.norm(s)
        l2, peak = np.linalg.norm(e) / size, e.max() / (size / np.sqrt(s.size))
        assert l2 <= 2e-6 * factor, f"image {image}: L2 error {l2:.2e}, expected at most {2e-6 * factor:.2e}"
        assert peak <= 2e-5 * factor, f"image {image}: max error {peak:.2e} of the RMS, expected {2e-5 * factor:.2e}"


@pytest.fixture(scope="session")
def assert_within_bound():
    return _assert_within_bound
