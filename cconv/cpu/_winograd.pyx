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

from ._core cimport Buffer, ceil_div, data_of, finish_of, int_table, kernels_of, lines, share
from .kernels cimport cconv_finish, cconv_kernels, cconv_winograd

cnp.import_array()

cdef enum:
    FEW = 6  # blocks per thread, below which threads share them
    PARTS = 4  # tasks per thread, at least, into which shared blocks are cut


cdef struct Blocks:
    const cconv_kernels *kernels
    cconv_winograd how
    cconv_finish finish
    int itemsize
    long C, K, panels, chains, points
    long tiles, count, blocks  # tiles of a block, of all images; blocks
    long point_in, point_out  # elements from one point to the next: of transformed input, of products
    long parts_in, parts_out  # shared blocks: parts of the channels, of the panels
    size_t block_bytes, products_at, strip_at  # of transformed input; of a thread's scratch
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
            points + c * job.tiles * job.itemsize, job.point_in)


cdef void multiply_panel(const Blocks *job, long block, long panel, const char *points, char *scratch) noexcept nogil:
    """One panel of output channels of a block, from transformed input to maps."""
    cdef const cconv_kernels *kernels = job.kernels
    cdef long lanes = kernels.lanes, first = block * job.tiles, count = min(job.tiles, job.count - first)
    cdef long k = panel * job.K // job.panels, outputs = (panel + 1) * job.K // job.panels - k
    cdef const char *weights = job.weights + k * job.points * job.C * job.itemsize
    cdef char *products = scratch + job.products_at
    cdef long vectors = (count + lanes - 1) // lanes, widest = kernels.widest[outputs - 1]
    cdef long cuts = (vectors + widest - 1) // widest
    cdef long point, chain, begin, end, cut, left, right, o, map
    cdef const char *bias
    for point in range(job.points):
        for chain in range(job.chains):
            begin, end = chain * job.C // job.chains, (chain + 1) * job.C // job.chains
            for cut in range(cuts):
                left, right = cut * vectors // cuts, (cut + 1) * vectors // cuts
                kernels.multiply_pixels(
                    <int>outputs, <int>(right - left), end - begin, job.offset + begin,
                    points + (point * job.point_in + left * lanes) * job.itemsize,
                    weights + (point * job.C + begin) * outputs * job.itemsize,
                    products + (point * job.point_out + left * lanes) * job.itemsize, job.tiles, chain > 0)
    for o in range(outputs):
        map = (k + o) * job.how.P * job.how.Q * job.itemsize
        bias = job.bias + (k + o) * job.itemsize
        kernels.winograd_output(
            &job.how, &job.finish,
            0 if job.bias == NULL else (<const float *>bias)[0] if job.itemsize == 4 else (<const double *>bias)[0],
            first, count, products + o * job.tiles * job.itemsize, job.point_out, scratch + job.strip_at,
            job.residual + map if job.residual != NULL else NULL, job.y + map)


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
    """A part of the panels of a shared block."""
    cdef const Blocks *job = <const Blocks *>untyped
    cdef long block = index // job.parts_out, part = index % job.parts_out, panel
    for panel in range(part * job.panels // job.parts_out, (part + 1) * job.panels // job.parts_out):
        multiply_panel(job, block, panel, job.shared + block * job.block_bytes, scratch)


cdef class WinogradConvolution:
    """A ConvSpec cut by a Winograd tiling for one ISA. Holds tables, no weights; run() may be called from many threads."""

    cdef Blocks job
    cdef list owners
    cdef size_t scratch_size  # of a thread that has blocks of its own

    def __init__(self, spec, tiling, str isa):
        cdef Blocks *job = &self.job
        cdef const cconv_kernels *kernels = kernels_of(isa, spec.dtype)
        cdef long alpha = tiling.transform.alpha, m = tiling.transform.m, line
        self.owners = []
        job.kernels = kernels
        job.itemsize = 4 if spec.dtype == "float32" else 8
        job.finish = finish_of(spec.activation)
        job.C, job.K, job.panels, job.chains, job.points = spec.C, spec.K, tiling.panels, tiling.chains, alpha * alpha
        job.tiles = tiling.tiles
        # One cache line more from point to point: powers of two would meet in the same sets of a cache.
        line = 64 // job.itemsize
        job.point_in = job.C * job.tiles + line
        job.point_out = ceil_div(job.K, job.panels) * job.tiles + line
        job.how.m, job.how.alpha = m, alpha
        job.how.H, job.how.W, job.how.P, job.how.Q = spec.H, spec.W, spec.P, spec.Q
        job.how.top, job.how.left = spec.padding[:2]
        job.how.tiles_high, job.how.tiles_wide = ceil_div(spec.P, m), ceil_div(spec.Q, m)
        job.how.map_stride = spec.K * spec.P * spec.Q
        # Every tile may stand alone in its row; gathering reads up to 5 vectors too far.
        job.how.strip_pitch = job.tiles * alpha + 6 * kernels.lanes
        job.how.coefficients = self._elements(spec.dtype, tiling.transform.coefficients)
        job.how.powers = self._elements(spec.dtype, tiling.transform.powers)
        job.how.filter = <const double *>self._elements("float64", tiling.transform.filter)
        job.offset = int_table(self.owners, range(0, job.C * job.tiles, job.tiles))
        job.block_bytes = lines((job.points * job.point_in + kernels.lanes) * job.itemsize)
        job.products_at = job.block_bytes
        job.strip_at = job.products_at + lines((job.points * job.point_out + kernels.lanes) * job.itemsize)
        self.scratch_size = job.strip_at + lines(
            alpha * job.how.strip_pitch * job.itemsize + (job.tiles + kernels.lanes) * sizeof(int32_t))

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

    def pack(self, cnp.ndarray weight not None):
        """The transformed panels of a C-ordered (K, C, R, S) weight, as run() wants them."""
        cdef Blocks *job = &self.job
        cdef Buffer packed = Buffer((job.K * job.points * job.C + job.kernels.lanes) * job.itemsize)
        cdef long taps = weight.shape[2] * weight.shape[3], panel, k, outputs, c
        cdef const char *source = data_of(weight)
        with nogil:
            for panel in range(job.panels):
                k = panel * job.K // job.panels
                outputs = (panel + 1) * job.K // job.panels - k
                for c in range(job.C):
                    job.kernels.winograd_filter(
                        &job.how, outputs, job.C * taps, source + (k * job.C + c) * taps * job.itemsize,
                        packed.data + (k * job.points * job.C + c * outputs) * job.itemsize, job.C * outputs)
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
            with nogil:
                share(whole_task, &job, job.blocks, scratch.data, self.scratch_size, threads)
            return
        cdef long wanted = ceil_div(PARTS * threads, job.blocks)
        cdef size_t own = self.scratch_size - job.products_at
        job.shared = scratch.data
        job.parts_in, job.parts_out = min(job.C, wanted), min(job.panels, wanted)
        # A thread's scratch has no room of its own for transformed input: its parts move to the front.
        job.strip_at -= job.products_at
        job.products_at = 0
        with nogil:
            share(input_task, &job, job.blocks * job.parts_in, job.shared + job.blocks * job.block_bytes, own, threads)
            share(output_task, &job, job.blocks * job.parts_out, job.shared + job.blocks * job.block_bytes, own, threads)
