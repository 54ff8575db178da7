"""CUDA: how a convolution is cut into blocks on a GPU. Pure arithmetic, no arrays.

In: a ConvSpec and a Machine whose device is "cuda".  Out: Ffma and Strips tilings, which cconv.gpu executes, and the
one estimated to be fastest.

Products are summed in the same chains and order whatever the tile, so the choice may depend on the batch and on the
device without changing a bit.
"""

from dataclasses import dataclass
from math import isqrt

from .direct import CHAIN
from .machine import Machine, ceil_div
from .specs import ITEMSIZE, ConvSpec

#: Products of a step: the rows of the two operands that lie in shared memory (kernels/conv.cu).
STEP = 8
#: dtype -> (outputs, pixels, rows, columns): a block's tile, and how much of it a thread has.
TILES = {
    "float32": ((128, 128, 8, 8), (104, 128, 8, 8), (64, 128, 8, 8), (32, 128, 4, 8), (64, 32, 4, 4), (16, 128, 4, 4)),
    "float64": ((64, 64, 4, 8), (32, 64, 4, 4), (64, 32, 4, 4), (16, 64, 2, 4)),
}
TILES["float16"] = TILES["bfloat16"] = TILES["float32"]
#: Time of a product beyond its own, in products: loads of operands for each row and column of a thread's tile; and what
#: gathering an input takes, which serves all outputs of a block. Guesses from counts of instructions, not measured.
LOAD, GATHER = 0.5, 10
#: Outputs that a multiprocessor needs under way at once to be busy; a guess too.
FILLING = 4096
#: Depthwise kernels that have code of their own: rows and columns alike, stride 1 or 2, no dilation.
KNOWN_STRIDES = (1, 2)


@dataclass(frozen=True, slots=True)
class Ffma:
    """A convolution as a product of matrices, by multiply-adds of ordinary numbers."""

    #: Of a block: output channels of one group, and pixels of all images.
    outputs: int
    pixels: int
    #: Of a thread.
    rows: int
    columns: int
    #: Steps of products in a chain.
    chain: int
    #: Multiplications and additions issued for one image, lanes of padding included.
    executed_flops: int

    algorithm = "direct"
    #: Whether its kernel reads a packed form of the weight, or the weight as it is.
    packs = True

    @property
    def label(self) -> str:
        return f"direct {self.outputs}x{self.pixels}"

    @property
    def packing(self) -> tuple:
        """What the packed form of a weight depends on."""
        return "ffma", self.outputs

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.outputs // self.rows * (self.pixels // self.columns)

    def panels(self, spec: ConvSpec) -> int:
        """Parts into which a group's output channels are cut."""
        return ceil_div(spec.K // spec.groups, self.outputs)


@dataclass(frozen=True, slots=True)
class Strips:
    """One output map from one input map."""

    #: Whether the kernel is one of those that have their own code.
    known: bool
    #: Products in a chain.
    chain: int
    executed_flops: int

    algorithm = "direct"
    label = "direct depthwise"
    packs = False


def computed(dtype: str) -> str:
    """The type in which sums are made."""
    return "float64" if dtype == "float64" else "float32"


def lanes(dtype: str) -> int:
    """Elements that a thread loads or stores at once."""
    return 16 // ITEMSIZE[computed(dtype)]


def known_kernels(dtype: str) -> tuple[int, ...]:
    """Rows of the depthwise kernels that have code of their own; of 16 bits the larger ones spill on sm_100."""
    return (3,) if ITEMSIZE[dtype] == 2 else (3, 5, 7)


def strip(kernel: int, stride: int) -> int:
    """Rows of outputs of a thread in those; of 7x7 at stride 2 two spill on sm_100, four leave room for one block."""
    return 1 if (kernel, stride) == (7, 2) else 4


def chain(depth: int) -> int:
    """Products in a chain: their number grows no faster than their length, for both round. A multiple of STEP."""
    return max(CHAIN, isqrt(depth)) // STEP * STEP


def candidates(spec: ConvSpec) -> tuple[Ffma | Strips, ...]:
    """Every way to compute the spec."""
    products = chain(spec.depth)
    if spec.groups == spec.C and not spec.preactivated:
        known = (
            spec.R == spec.S
            and spec.R in known_kernels(spec.dtype)
            and spec.stride[0] == spec.stride[1]
            and spec.stride[0] in KNOWN_STRIDES
            and spec.dilation == (1, 1)
        )
        strips = tuple(Strips(k, products, 2 * spec.K * spec.P * spec.Q * spec.depth) for k in {known, False})
        # Shared memory pays only where several outputs read the same input.
        if spec.K // spec.groups < TILES[spec.dtype][-1][0]:
            return tuple(sorted(strips, key=lambda s: not s.known))
    else:
        strips = ()
    depth = ceil_div(spec.depth, STEP) * STEP
    found = []
    for outputs, pixels, rows, columns in TILES[spec.dtype]:
        cut = spec.groups * ceil_div(spec.K // spec.groups, outputs) * outputs
        found.append(Ffma(outputs, pixels, rows, columns, products // STEP, 2 * cut * spec.P * spec.Q * depth))
    return (*found, *strips)


def estimate(spec: ConvSpec, machine: Machine, tiling: Ffma, images: int) -> float:
    """Time of so many images, in products of one multiprocessor: rounds of blocks, each as long as its tile."""
    blocks = spec.groups * tiling.panels(spec) * ceil_div(images * spec.P * spec.Q, tiling.pixels)
    loads = LOAD * (1 / tiling.rows + 1 / tiling.columns) + GATHER / tiling.outputs
    # Small blocks fill a multiprocessor's lanes together; one alone takes as long as several.
    tile = tiling.outputs * tiling.pixels
    together = max(1, FILLING // tile)
    return ceil_div(blocks, machine.threads * together) * together * tile * (1 + loads) * ceil_div(spec.depth, STEP)


def choose(spec: ConvSpec, machine: Machine, images: int) -> Ffma | Strips:
    """The candidate with the least estimated time."""
    found = candidates(spec)
    tiles = [tiling for tiling in found if isinstance(tiling, Ffma)]
    if not tiles:
        return found[0]
    # Of tiles that take equally long the smallest: it computes the fewest outputs that there are not.
    return min(tiles, key=lambda tiling: (estimate(spec, machine, tiling, images), tiling.outputs * tiling.pixels))
