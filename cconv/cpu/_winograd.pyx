# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Winograd: the loops of a convolution over blocks of tiles: transform, multiply, transform back.

In: a ConvSpec and its Winograd tiling, packed weights, NumPy arrays that the caller has checked.  Out: numbers in y.
The arithmetic is in kernels/winograd.inc.c and multiply.inc.c, the decisions in planning/algorithm.py.

The tiles of all images are one sequence, cut into blocks. With many blocks a thread takes one and does everything,
its transformed input in its own scratch. With few, all threads first transform the input of all of them, into scratch
that they share, and then take (block, some panels of outputs) each.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t
from libc.string cimport memset

from ._core cimport Buffer, ceil_div, compute, data_of, finish_of, int_table, kernels_of, lines, share
from .kernels cimport cconv_finish, cconv_kernels, cconv_winograd

cnp.import_array()

cdef enum:
    FEW = 6  # blocks per thread, below which threads share them
    SHARED_PACKING = 1 << 18  # bytes of filters from which on threads share their transformation
    PARTS = 4  # tasks per thread, at least, into which the input of shared blocks is cut


cdef struct Blocks:
    const cconv_kernels *kernels
    cconv_winograd how
    cconv_finish finish
    int itemsize, pixel_lanes
    long C, K, panels, chains, points
    long tiles, pitch, count, blocks  # tiles of a block, and as whole vectors; tiles of all images; blocks
    long point_in, point_out  # elements from one point to the next: of transformed input, of products
    long parts_in  # shared blocks: parts of the channels
    size_t block_bytes, products_at, sums_at, strip_at  # of transformed input; of a thread's scratch
    const int32_t *offset
    char *shared  # transformed input of all blocks
    const char *x
    const char *weights
    const char *bias
    const char *residual
    char *y


cdef void transform_input(const Blocks *job, long block, long begin, long end, char *points, char *strip) noexcept nogil:
    """Channels begin .. end-1 of a block."""
    cdef long first = block * job.tiles, c
    for c in range(begin, end):
        job.kernels.winograd_input(
            &job.how, first, min(job.tiles, job.count - first), job.x + c * job.how.channel_stride, strip,
            points + c * job.pitch * job.itemsize, job.point_in)


cdef void multiply_pixels(
    const Blocks *job, long vectors, long outputs, const char *input, const char *weights, char *products
) noexcept nogil:
    """The products of one point, a vector of tiles at a time."""
    cdef const cconv_kernels *kernels = job.kernels
    cdef long widest = kernels.widest[outputs - 1], cuts = (vectors + widest - 1) // widest
    cdef long chain, begin, end, cut, left, right
    for chain in range(job.chains):
        begin, end = chain * job.C // job.chains, (chain + 1) * job.C // job.chains
        for cut in range(cuts):
            left, right = cut * vectors // cuts, (cut + 1) * vectors // cuts
            kernels.multiply_pixels(
                <int>outputs, <int>(right - left), end - begin, job.offset + begin,
                input + left * kernels.lanes * job.itemsize, weights + begin * outputs * job.itemsize,
                products + left * kernels.lanes * job.itemsize, job.pitch, chain > 0)


cdef void multiply_channels(
    const Blocks *job, long count, long width, const char *input, const char *weights, char *sums,
    char *products
) noexcept nogil:
    """The products of one point, a vector of output channels at a time: no lane is wasted on few tiles."""
    cdef const cconv_kernels *kernels = job.kernels
    cdef long cuts = (count + kernels.rows - 1) // kernels.rows
    cdef long chain, begin, end, cut, left, right
    for chain in range(job.chains):
        begin, end = chain * job.C // job.chains, (chain + 1) * job.C // job.chains
        for cut in range(cuts):
            left, right = cut * count // cuts, (cut + 1) * count // cuts
            kernels.multiply_channels(
                <int>(right - left), <int>(width // kernels.lanes), end - begin, job.offset + begin,
                input + left * job.itemsize, weights + begin * width * job.itemsize,
                sums + left * width * job.itemsize, width, chain > 0)
    kernels.transpose(count, width, sums, width, products, job.pitch)


cdef inline long panel_begin(const Blocks *job, long panel) noexcept nogil:
    """The first output channel of a panel."""
    if job.pixel_lanes:
        return panel * job.K // job.panels
    return min(job.K, panel * job.kernels.vectors * job.kernels.lanes)


cdef inline long panel_width(const Blocks *job, long outputs) noexcept nogil:
    """Output channels of a panel as its weights hold them."""
    return outputs if job.pixel_lanes else (outputs + job.kernels.lanes - 1) // job.kernels.lanes * job.kernels.lanes


cdef void multiply_panel(const Blocks *job, long block, long panel, const char *points, char *scratch) noexcept nogil:
    """One panel of output channels of a block, from transformed input to maps."""
    cdef long first = block * job.tiles, count = min(job.tiles, job.count - first)
    cdef long k = panel_begin(job, panel), outputs = panel_begin(job, panel + 1) - k
    cdef long width = panel_width(job, outputs), point, o, map
    cdef const char *weights = job.weights + k * job.points * job.C * job.itemsize
    cdef const char *input
    cdef const char *bias
    cdef char *products
    for point in range(job.points):
        input = points + point * job.point_in * job.itemsize
        products = scratch + job.products_at + point * job.point_out * job.itemsize
        if job.pixel_lanes:
            multiply_pixels(job, (count + job.kernels.lanes - 1) // job.kernels.lanes, outputs, input,
                            weights + point * job.C * width * job.itemsize, products)
        else:
            multiply_channels(job, count, width, input, weights + point * job.C * width * job.itemsize,
                              scratch + job.sums_at, products)
    for o in range(outputs):
        map = (k + o) * job.how.P * job.how.Q * job.itemsize
        bias = job.bias + (k + o) * job.itemsize
        job.kernels.winograd_output(
            &job.how, &job.finish,
            0 if job.bias == NULL else (<const float *>bias)[0] if job.itemsize == 4 else (<const double *>bias)[0],
            first, count, scratch + job.products_at + o * job.pitch * job.itemsize, job.point_out,
            scratch + job.strip_at, job.residual + map if job.residual != NULL else NULL, job.y + map)


cdef void whole_task(const void *untyped, long block, char *scratch) noexcept nogil:
    """A block of tiles."""
    cdef const Blocks *job = <const Blocks *>untyped
    cdef long panel
    transform_input(job, block, 0, job.C, scratch, scratch + job.strip_at)
    for panel in range(job.panels):
        multiply_panel(job, block, panel, scratch, scratch)


cdef void input_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """A part of the channels of a shared block."""
    cdef const Blocks *job = <const Blocks *>untyped
    cdef long block = index // job.parts_in, part = index % job.parts_in
    transform_input(job, block, part * job.C // job.parts_in, (part + 1) * job.C // job.parts_in,
                    job.shared + block * job.block_bytes, scratch + job.strip_at)


cdef void output_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """A panel of a shared block."""
    cdef const Blocks *job = <const Blocks *>untyped
    cdef long block = index // job.panels
    multiply_panel(job, block, index % job.panels, job.shared + block * job.block_bytes, scratch)


cdef struct Filters:
    const Blocks *blocks
    long taps
    const char *weight
    char *packed


cdef void filter_task(const void *untyped, long panel, char *scratch) noexcept nogil:
    """The transformed filters of a panel."""
    cdef const Filters *filters = <const Filters *>untyped
    cdef const Blocks *job = filters.blocks
    cdef long k = panel_begin(job, panel), outputs = panel_begin(job, panel + 1) - k
    cdef long width = panel_width(job, outputs), c
    cdef char *to = filters.packed + k * job.points * job.C * job.itemsize
    if width > outputs:
        memset(to, 0, width * job.points * job.C * job.itemsize)
    for c in range(job.C):
        job.kernels.winograd_filter(
            &job.how, outputs, job.C * filters.taps,
            filters.weight + (k * job.C + c) * filters.taps * job.itemsize, to + c * width * job.itemsize, job.C * width)


cdef class WinogradConvolution:
    """A ConvSpec cut by a Winograd tiling for one ISA. Holds tables, no weights; run() may be called from many threads."""

    cdef Blocks job
    cdef list owners
    cdef size_t scratch_size  # of a thread that has blocks of its own

    def __init__(self, spec, tiling, str isa):
        cdef Blocks *job = &self.job
        cdef const cconv_kernels *kernels = kernels_of(isa, spec.dtype)
        cdef long alpha = tiling.transform.alpha, m = tiling.transform.m, line, outputs
        self.owners = []
        job.kernels = kernels
        job.itemsize = 4 if spec.dtype == "float32" else 8
        job.finish = finish_of(spec.activation)
        job.C, job.K, job.panels, job.chains, job.points = spec.C, spec.K, tiling.panels, tiling.chains, alpha * alpha
        job.pixel_lanes = tiling.lanes == "pixels"
        job.tiles = tiling.tiles
        job.pitch = ceil_div(job.tiles, kernels.lanes) * kernels.lanes
        # One cache line more from point to point: powers of two would meet in the same sets of a cache.
        line = 64 // job.itemsize
        job.point_in = job.C * job.pitch + line
        outputs = ceil_div(job.K, job.panels) if job.pixel_lanes else kernels.vectors * kernels.lanes
        job.point_out = outputs * job.pitch + line
        job.how.m, job.how.alpha = m, alpha
        job.how.H, job.how.W, job.how.P, job.how.Q = spec.H, spec.W, spec.P, spec.Q
        job.how.top, job.how.left = spec.padding[:2]
        job.how.tiles_high, job.how.tiles_wide = ceil_div(spec.P, m), ceil_div(spec.Q, m)
        job.how.map_stride = spec.K * spec.P * spec.Q
        # Every tile may stand alone in its row; gathering reads up to 5 vectors too far.
        job.how.strip_pitch = job.pitch * alpha + 6 * kernels.lanes
        job.how.coefficients = self._elements(spec.dtype, tiling.transform.coefficients)
        job.how.powers = self._elements(spec.dtype, tiling.transform.powers)
        job.how.filter = <const double *>self._elements("float64", tiling.transform.filter)
        job.offset = int_table(self.owners, range(0, job.C * job.pitch, job.pitch))
        job.block_bytes = lines((job.points * job.point_in + kernels.lanes) * job.itemsize)
        job.products_at = job.block_bytes
        job.sums_at = job.products_at + lines((job.points * job.point_out + kernels.lanes) * job.itemsize)
        job.strip_at = job.sums_at + (0 if job.pixel_lanes else lines(job.pitch * outputs * job.itemsize))
        self.scratch_size = job.strip_at + lines(
            alpha * job.how.strip_pitch * job.itemsize + (job.pitch + kernels.lanes) * sizeof(int32_t))

    cdef const void *_elements(self, str dtype, values) except NULL:
        """A C copy of numbers, in the type of the arrays."""
        cdef Buffer buffer = Buffer(len(values) * 8)
        cdef Py_ssize_t i
        for i, value in enumerate(values):
            if dtype == "float32":
                (<float *>buffer.data)[i] = value
            else:
                (<double *>buffer.data)[i] = value
        self.owners.append(buffer)
        return buffer.data

    cdef bint _shares(self, long blocks, int threads):
        return threads > 1 and blocks < FEW * threads

    cdef long _blocks(self, long images):
        return ceil_div(images * self.job.how.tiles_high * self.job.how.tiles_wide, self.job.tiles)

    def scratch_bytes(self, long images, int threads):
        """Bytes of scratch that a run needs."""
        cdef long blocks = self._blocks(images)
        if self._shares(blocks, threads):
            return blocks * self.job.block_bytes + threads * (self.scratch_size - self.job.products_at)
        return threads * self.scratch_size

    def pack(self, cnp.ndarray weight not None, int threads=1):
        """The transformed panels of a C-ordered (K, C, R, S) weight, as run() wants them."""
        cdef Filters job
        cdef long last = panel_begin(&self.job, self.job.panels - 1)
        cdef long padded = last + panel_width(&self.job, self.job.K - last)
        cdef Buffer packed = Buffer((padded * self.job.points * self.job.C + self.job.kernels.lanes) * self.job.itemsize)
        job.blocks = &self.job
        job.taps = weight.shape[2] * weight.shape[3]
        job.weight, job.packed = data_of(weight), packed.data
        if packed.nbytes < SHARED_PACKING:
            threads = 1
        with nogil:
            share(filter_task, &job, self.job.panels, NULL, 0, threads)
        return packed

    def run(self, cnp.ndarray x not None, Buffer weights not None, cnp.ndarray bias, cnp.ndarray residual,
            cnp.ndarray y not None, int threads, Buffer scratch not None):
        """y = activation(conv(x) + bias + residual); y, bias and residual C-ordered, x with its rows in one piece."""
        cdef Blocks job = self.job
        job.count = x.shape[0] * job.how.tiles_high * job.how.tiles_wide
        job.blocks = self._blocks(x.shape[0])
        job.x = data_of(x)
        job.how.image_stride, job.how.channel_stride, job.how.row_stride = x.strides[0], x.strides[1], x.strides[2]
        job.weights, job.bias, job.residual, job.y = weights.data, data_of(bias), data_of(residual), data_of(y)
        if not self._shares(job.blocks, threads):
            compute(whole_task, &job, job.blocks, scratch.data, self.scratch_size, threads)
            return
        cdef size_t own = self.scratch_size - job.products_at
        job.shared = scratch.data
        job.parts_in = min(job.C, ceil_div(PARTS * threads, job.blocks))
        # A thread's scratch has no room of its own for transformed input: its parts move to the front.
        job.strip_at -= job.products_at
        job.sums_at -= job.products_at
        job.products_at = 0
        with nogil:
            share(input_task, &job, job.blocks * job.parts_in, job.shared + job.blocks * job.block_bytes, own, threads)
            share(output_task, &job, job.blocks * job.panels, job.shared + job.blocks * job.block_bytes, own, threads)
