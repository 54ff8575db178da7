"""Grid: convolutions by the thousand, drawn by seed, and every way to compute each of them.

In: a family and a number.  Out: Layers (sizes, options, how the input lies in memory, the machine that plans), the
tilings of a layer on an instruction set, and a run of one of them.

tests/kernels/conftest.py hands this module to the tests, which cannot import each other; guarded.py imports it.
"""

import random
from dataclasses import dataclass, replace

import numpy as np

import cconv
from cconv import cpu, reference
from cconv.planning import algorithm, plan, specs
from cconv.weights import Weights

ISAS = tuple(name for name, usable, *_ in cpu.instruction_sets() if usable)

#: Vectors have 2, 4, 8 or 16 lanes; register tiles 4, 6 or 14 pixels and 1 to 8 vectors.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 18, 28, 29, 31, 32, 33, 34, 47, 48, 49, 63, 64, 65, 130)
CHANNELS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 24, 27, 28, 29, 31, 32, 33, 34, 65)
#: The second-level cache that a plan believes in: with little of it small images are cut into many tiles.
CACHES = (1 << 9, 1 << 12, 1 << 15, 1 << 20)
LAYOUTS = ("plain", "channels last", "backwards", "every other", "wider rows", "wider maps", "one image", "misaligned")
#: Around the ends of chains of 96 products: (channels, kernel).
DEPTHS = ((95, (1, 1)), (96, (1, 1)), (97, (1, 1)), (193, (1, 1)), (11, (3, 3)), (33, (1, 3)), (700, (1, 1)))
#: Exact in binary arithmetic.
ACTIVATIONS = (None, None, "relu", "relu6", ("leaky_relu", 0.5))
MOST_MACS = 1_500_000


@dataclass(frozen=True)
class Layer:
    """One convolution, and the machine for which it is planned."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    residual: bool = False
    activation: str | tuple | None = None
    layout: str = "plain"
    l2_bytes: int = 1 << 20
    threads: int = 1
    preactivated: bool = False

    def spec(self, dtype: str, algorithm: str = "direct", precision: str = "highest") -> specs.ConvSpec:
        spec = specs.conv(
            self.x[1:], self.weight, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, bias=self.bias, residual=self.residual, activation=self.activation, dtype=dtype,
            algorithm=algorithm, precision=precision,
        )  # fmt: skip
        return replace(spec, preactivated=self.preactivated)

    def machine(self, isa: str):
        return replace(cpu.machine_of(isa, self.threads), l2_bytes=self.l2_bytes)


def _sizes(draw: random.Random, family: str) -> dict:
    """C and K per group, kernel, stride, dilation, groups of a family."""
    kernel, stride, dilation, groups = (1, 1), (1, 1), (1, 1), 1
    depth, outputs = draw.randint(1, 9), draw.choice(CHANNELS)
    if family == "dense":
        kernel = draw.randint(1, 5), draw.randint(1, 5)
        stride = draw.choice(((1, 1), (1, 1), (2, 2), (1, 2), (3, 1), (4, 3)))
        dilation = draw.choice(((1, 1), (1, 1), (2, 2), (3, 1), (1, 4), (7, 9)))
    elif family == "pointwise":
        stride = draw.choice(((1, 1), (1, 1), (1, 1), (2, 2), (1, 3)))
        depth = draw.choice((1, 2, 5, 16, 33))
    elif family == "depthwise":
        groups, depth, outputs = draw.randint(1, 9), 1, draw.choice((1, 1, 1, 2, 3))
        kernel = draw.choice(((3, 3), (3, 3), (5, 5), (1, 1), (2, 4), (7, 7), (3, 5), (1, 6)))
        stride = draw.choice(((1, 1), (1, 1), (2, 2), (2, 1), (3, 2), (1, 3)))
        dilation = draw.choice(((1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (3, 5)))
    elif family == "grouped":
        groups, depth, outputs = draw.randint(2, 5), draw.randint(1, 5), draw.choice((1, 2, 3, 4, 5, 8, 13, 17, 33))
        kernel, stride = draw.choice(((1, 1), (3, 3), (2, 3))), draw.choice(((1, 1), (2, 2), (2, 3)))
    elif family == "deep":
        depth, kernel = draw.choice(DEPTHS)
        outputs = draw.choice((1, 7, 16, 29, 33))
    else:  # "one pixel": the window is the image
        groups, kernel = draw.choice((1, 1, 2, 3)), (draw.randint(1, 5), draw.randint(1, 5))
        stride, dilation = (draw.randint(1, 3), 1), (1, draw.randint(1, 3))
    return {
        "depth": depth,
        "outputs": outputs,
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
    }


def _layer(draw: random.Random, family: str) -> Layer:
    sizes = _sizes(draw, family)
    groups, dilation = sizes["groups"], sizes["dilation"]
    reach = [d * (k - 1) + 1 for k, d in zip(sizes["kernel"], dilation, strict=True)]
    padding = draw.choice(((0, 0, 0, 0), (0, 0, 0, 0), tuple(r // 2 for r in reach) * 2, None))
    padding = padding or tuple(draw.randint(0, 4) for _ in range(4))
    least = [max(1, r - padding[i] - padding[i + 2]) for i, r in enumerate(reach)]
    extra = draw.randint(0, 12), draw.choice(WIDTHS) - 1
    images = draw.choice((1, 1, 1, 2, 3))
    if family == "one pixel":
        padding = (0, 0, 0, 0) if draw.random() < 0.5 else tuple(draw.randint(0, r // 2) for r in (*reach, *reach))
        least = [max(1, r - padding[i] - padding[i + 2]) for i, r in enumerate(reach)]
        extra, images = (0, 0), draw.choice((1, 2, 13, 14, 15, 29))
    return Layer(
        (images, groups * sizes["depth"], least[0] + extra[0], least[1] + extra[1]),
        (groups * sizes["outputs"], sizes["depth"], *sizes["kernel"]),
        sizes["stride"], padding, dilation, groups, draw.random() < 0.5, draw.random() < 0.4, draw.choice(ACTIVATIONS),
        draw.choice(LAYOUTS) if draw.random() < 0.5 else "plain", draw.choice(CACHES), draw.choice((1, 1, 1, 2, 3)),
    )  # fmt: skip


FAMILIES = ("dense", "pointwise", "depthwise", "grouped", "deep", "one pixel")


def layers(family: str, seed: int, count: int):
    """So many layers of a family, the same ones for the same seed."""
    draw = random.Random(f"{family} {seed}")
    found = 0
    while found < count:
        layer = _layer(draw, family)
        spec = layer.spec("float32")
        if family in ("pointwise", "deep") and spec.may_be_preactivated:
            layer = replace(layer, preactivated=draw.random() < 0.5)
        if layer.x[0] * spec.K * spec.P * spec.Q * spec.depth <= MOST_MACS:
            found += 1
            yield layer


def winograd_layers(seed: int, count: int, kernels=(3, 3, 5, 7), channels=(16, 17, 24, 33)):
    """Layers that Winograd can compute."""
    draw = random.Random(f"winograd {seed}")
    for _ in range(count):
        size = draw.choice(kernels)
        padding = draw.choice(((size // 2,) * 4, (0, 0, 0, 0), tuple(draw.randint(0, size + 1) for _ in range(4))))
        stride, dilation = (1, 1), (1, 1)
        if size < 7 and draw.random() < 0.35:
            stride = 2, 2
        elif draw.random() < 0.3:
            dilation = draw.choice(((2, 2), (2, 2), (1, 2), (3, 1), (2, 3)))
        # As many outputs as the dilation has phases, at least.
        least = [max(1, d * size - padding[i] - padding[i + 2]) for i, d in enumerate(dilation)]
        extra = draw.choice((0, 1, 2, 3, 5, 7, 12, 20)), draw.choice((0, 1, 2, 4, 6, 11, 13, 17, 30, 45))
        depth = draw.choice(channels)
        yield Layer(
            (draw.choice((1, 2, 3, 5)), depth, least[0] + extra[0], least[1] + extra[1]),
            (draw.choice((1, 5, 16, 17, 28, 29, 33, 48)), depth, size, size), stride, padding, dilation,
            bias=draw.random() < 0.5, residual=draw.random() < 0.5, activation=draw.choice(ACTIVATIONS),
            layout=draw.choice(LAYOUTS) if draw.random() < 0.3 else "plain",
            l2_bytes=draw.choice((1 << 12, 1 << 20)), threads=draw.choice((1, 2)),
        )  # fmt: skip


def direct_tilings(layer: Layer, isa: str, dtype: str) -> tuple:
    """Every direct way to compute a layer, with weights that are packed ahead or for one run."""
    asked = layer.spec(dtype), layer.machine(isa), layer.x[0]
    return tuple(dict.fromkeys(t for packs in (False, True) for t in algorithm.candidates(*asked, packs)))


def winograd_tilings(layer: Layer, isa: str, dtype: str, precision: str = "highest") -> list:
    """Every transform with both kinds of lanes, in blocks of few and of many tiles; filters transformed ahead, and by
    the tasks that use them."""
    spec, machine = layer.spec(dtype, "winograd", precision), layer.machine(isa)
    lanes = machine.vector_bytes // specs.ITEMSIZE[dtype]
    found = []
    for planned in algorithm.candidates(spec, machine, layer.x[0]):
        found.append(planned)
        for vectors in (1, 3):
            # Large register tiles, and those that keep the totals of their chains.
            ways = {machine.panels(spec.K, vectors)} | ({-(-spec.K // machine.kept)} if machine.kept else set())
            found += [replace(planned, lanes="pixels", tiles=vectors * lanes, panels=panels) for panels in ways]
        for tiles in (1, lanes + 3):
            for vectors in (machine.tile_vectors, 1):
                panels = -(-spec.K // (lanes * vectors))
                found.append(replace(planned, lanes="channels", tiles=tiles, panels=panels))
        # One of either lanes whose tasks transform their filters.
        found += [replace(tiling, held=1, fused=True) for tiling in (found[-5], found[-1])]
    return list(dict.fromkeys(found))


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers, lying differently in memory."""
    n, c, h, w = array.shape
    if layout == "channels last":
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "backwards":
        return np.ascontiguousarray(array[:, ::-1, ::-1, ::-1])[:, ::-1, ::-1, ::-1]
    if layout == "every other":
        room = np.full((n, c, 2 * h, 2 * w), np.nan, array.dtype)[:, :, 1::2, ::2]
    elif layout == "wider rows":
        room = np.full((n, c, h, w + 3), np.nan, array.dtype)[..., 1 : w + 1]
    elif layout == "wider maps":
        room = np.full((n, c + 1, h + 1, w), np.nan, array.dtype)[:, 1:, :h]
    elif layout == "one image":  # in batches all images are one
        return np.broadcast_to(np.ascontiguousarray(array[:1]), array.shape)
    elif layout == "misaligned":
        room = np.frombuffer(bytearray(array.nbytes + 1), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    else:
        return array
    room[...] = array
    return room


@dataclass(frozen=True)
class Operands:
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    residual: np.ndarray | None
    before: np.ndarray | None = None

    @property
    def weights(self) -> Weights:
        before = () if self.before is None else (self.before,)
        return Weights(lambda _: (self.weight, self.bias, *before))


def operands(layer: Layer, dtype: str, number) -> Operands:
    """Arrays of a layer; `number(shape)` draws them."""
    output = layer.spec(dtype).output
    return Operands(
        laid_out(number(layer.x).astype(dtype), layer.layout),
        number(layer.weight).astype(dtype),
        number(layer.weight[:1]).astype(dtype) if layer.bias else None,
        number((layer.x[0], *output)).astype(dtype) if layer.residual else None,
        number((2, layer.x[1])).astype(dtype) if layer.preactivated else None,
    )


def program(layer: Layer, isa: str, dtype: str, tiling, given: Operands, precision: str = "highest"):
    """A layer's program by one tiling. Its work is overstated: small layers would run on one thread whatever is set."""
    overstated = replace(tiling, executed_flops=10**10)
    spec = layer.spec(dtype, tiling.algorithm, precision)
    return cpu.build(plan.single(spec, layer.machine(isa), overstated), given.weights)


def run(built, given: Operands, out=None) -> np.ndarray:
    inputs = [given.x] if given.residual is None else [given.x, given.residual]
    return built.run(inputs, None if out is None else [out])[0]


def exact(layer: Layer, given: Operands) -> np.ndarray:
    """The layer by the reference twin, in float64."""
    return run(reference.build(plan.single(layer.spec("float64"), reference.machine()), given.weights), given)


def precise(layer: Layer, given: Operands) -> np.ndarray:
    """A layer without groups and activation, before its rounding to any type: in long double."""
    top, left, bottom, right = layer.padding
    x, weight = given.x.astype(np.longdouble), given.weight.astype(np.longdouble)
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (down, across), (rows, columns) = layer.stride, layer.spec("float64").output[1:]
    sums = np.zeros((weight.shape[0], len(x), rows, columns), np.longdouble)
    for r, s in np.ndindex(*weight.shape[2:]):
        window = padded[:, :, r * layer.dilation[0] :: down, s * layer.dilation[1] :: across]
        sums += np.tensordot(weight[:, :, r, s], window[:, :, :rows, :columns], ([1], [1]))
    sums = sums.transpose(1, 0, 2, 3)
    if given.bias is not None:
        sums = sums + given.bias[:, None, None]
    return sums if given.residual is None else sums + given.residual


class Threads:
    """So many threads for the runs inside a `with`."""

    def __init__(self, count: int):
        self.count = count

    def __enter__(self):
        cconv.set_num_threads(self.count)

    def __exit__(self, *_):
        cconv.set_num_threads(None)
