# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Winograd: the loops of a convolution over blocks of tiles: transform, multiply, transform back.

In: a ConvSpec and its Winograd tiling, packed weights, images that the caller has checked.  Out: numbers in y.
The arithmetic is in kernels/winograd.inc.c and multiply.inc.c, the decisions in planning/algorithm.py.

The tiles of all images are one sequence, cut into blocks. Either a thread takes a block and does everything, its
transformed input in its own scratch. Or, some blocks at a time, all threads first transform the input of all of them,
into scratch that they share, and then take (block, some panels of outputs) each: weights are read once per block, so
large weights want large blocks.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t
from libc.string cimport memset

from ._core cimport (
    Buffer, Call, Kernel, Phases, Room, borrow, ceil_div, data_of, finish_of, int_table, kernels_of, lines, share_tasks,
)
from .kernels cimport CCONV_RUN, CCONV_STRIP, cconv_finish, cconv_kernels, cconv_transform, cconv_winograd

from functools import lru_cache

cnp.import_array()

cdef enum:
    SHARED_PACKING = 1 << 18  # bytes of filters from which on threads share their transformation
    PARTS = 4  # tasks per thread, at least, into which filters and the input of shared blocks are cut


cdef struct Blocks:
    const cconv_kernels *kernels
    cconv_winograd how
    cconv_finish finish
    int itemsize, pixel_lanes, fused
    long C, K, panels, group, groups, chain, points  # group: panels of a task; chain: products of one
    long tiles, pitch, strip, count, blocks  # tiles of a block, as whole vectors, at once; of all images; blocks
    long point_in, point_out, point_weights  # elements from one point to the next: transformed input, products, filters
    long tile_out, output_out  # from a product to the next tile's, and to the next output's
    long far_images  # from so many on the result goes past the caches
    long held, parts_in  # shared blocks: how many at a time, parts of the channels
    size_t block_bytes, products_at, strip_at, filters_at  # of transformed input; of a thread's scratch
    long taps
    const int32_t *offset
    char *shared  # transformed input of all blocks
    const char *x
    const char *weights
    const char *bias
    const char *residual
    char *y


cdef void transform_input(
    const Blocks *job, long block, long begin, long end, char *points, char *strip
) noexcept nogil:
    """Channels begin .. end-1 of a block."""
    cdef long first = block * job.tiles, count = min(job.tiles, job.count - first), i, t
    for i in range((count + job.strip - 1) // job.strip):
        t = i * job.strip
        job.kernels.winograd_input(
            &job.how, first + t, min(job.strip, count - t), end - begin, job.x + begin * job.how.channel_stride, strip,
            points + (begin * job.pitch + t) * job.itemsize, job.point_in, job.pitch)


cdef inline long panel_begin(const Blocks *job, long panel) noexcept nogil:
    """The first output channel of a panel."""
    if job.pixel_lanes:
        return panel * job.K // job.panels
    return min(job.K, panel * ceil_div(job.K, job.kernels.lanes) // job.panels * job.kernels.lanes)


cdef inline long panel_width(const Blocks *job, long outputs) noexcept nogil:
    """Output channels of a panel as its weights hold them."""
    return outputs if job.pixel_lanes else (outputs + job.kernels.lanes - 1) // job.kernels.lanes * job.kernels.lanes


cdef void transform_filters(
    const Blocks *job, const char *weight, long panel, long first, long last, char *to, long pitch
) noexcept nogil:
    """Channels first .. last-1 of a panel of filters, points `pitch` elements apart."""
    cdef long k = panel_begin(job, panel), outputs = panel_begin(job, panel + 1) - k
    cdef long width = panel_width(job, outputs), point
    if width > outputs:
        for point in range(job.points):
            memset(to + point * pitch * job.itemsize, 0, width * (last - first) * job.itemsize)
    job.kernels.winograd_filter(
        &job.how, outputs, width, last - first, job.C,
        weight + (k * job.C + first) * job.taps * job.itemsize, to, pitch)


cdef struct Filters:
    const Blocks *blocks
    const char *weight
    char *packed
    long parts  # of a panel's channels


cdef void filter_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """The transformed filters of a panel, or some channels of them."""
    cdef const Filters *filters = <const Filters *>untyped
    cdef const Blocks *job = filters.blocks
    cdef long panel = index // filters.parts, part = index % filters.parts
    cdef long first = part * job.C // filters.parts, last = (part + 1) * job.C // filters.parts
    cdef long k = panel_begin(job, panel), width = panel_width(job, panel_begin(job, panel + 1) - k)
    transform_filters(
        job, filters.weight, panel, first, last, filters.packed + (k * job.C + first * width) * job.itemsize,
        job.point_weights)


cdef void multiply_panels(
    const Blocks *job, long count, long begin, long end, const char *points, const char *filters, char *products
) noexcept nogil:
    """Panels begin .. end-1, point by point; `filters` and `products` begin with the first of them."""
    cdef const cconv_kernels *kernels = job.kernels
    cdef int vectors = <int>((count + kernels.lanes - 1) // kernels.lanes)
    cdef long first_output = panel_begin(job, begin), point, panel, k, outputs
    cdef const char *input
    cdef const char *weights
    cdef char *to
    for point in range(job.points):
        input = points + point * job.point_in * job.itemsize
        for panel in range(begin, end):
            k = panel_begin(job, panel) - first_output
            outputs = panel_begin(job, panel + 1) - first_output - k
            weights = filters + (point * job.point_weights + k * job.C) * job.itemsize
            to = products + (point * job.point_out + k * job.output_out) * job.itemsize
            if job.pixel_lanes:
                kernels.multiply_pixels(
                    <int>outputs, vectors, job.C, job.chain, job.offset, input, weights, to, job.output_out, 0)
            else:
                kernels.multiply_channels(
                    <int>count, <int>(panel_width(job, outputs) // kernels.lanes), job.C, job.chain, job.offset, input,
                    weights, to, job.tile_out, 0)


cdef void multiply_group(const Blocks *job, long block, long group, const char *points, char *scratch) noexcept nogil:
    """Some panels of output channels of a block, from transformed input to maps."""
    cdef const cconv_kernels *kernels = job.kernels
    cdef long first = block * job.tiles, count = min(job.tiles, job.count - first)
    cdef long begin = group * job.panels // job.groups, end = (group + 1) * job.panels // job.groups
    cdef long first_output = panel_begin(job, begin), last_output = panel_begin(job, end), panel, map, i, t
    cdef char *filters = scratch + job.filters_at
    cdef char *products = scratch + job.products_at
    if job.fused:
        # A panel at a time, whose filters are near when they are used.
        for panel in range(begin, end):
            transform_filters(job, job.weights, panel, 0, job.C, filters, job.point_weights)
            multiply_panels(job, count, panel, panel + 1, points, filters,
                            products + (panel_begin(job, panel) - first_output) * job.output_out * job.itemsize)
    else:
        multiply_panels(job, count, begin, end, points, job.weights + first_output * job.C * job.itemsize, products)
    output = kernels.winograd_output_pixels if job.pixel_lanes else kernels.winograd_output_channels
    map = first_output * job.how.P * job.how.Q * job.itemsize
    for i in range((count + job.strip - 1) // job.strip):
        t = i * job.strip
        output(
            &job.how, &job.finish, job.bias + first_output * job.itemsize if job.bias != NULL else NULL, first + t,
            min(job.strip, count - t), last_output - first_output, products + t * job.tile_out * job.itemsize,
            job.point_out, job.output_out if job.pixel_lanes else job.tile_out, scratch + job.strip_at,
            job.residual + map if job.residual != NULL else NULL, job.y + map)
    if job.finish.past:
        kernels.settle()


cdef void whole_task(const void *untyped, long block, char *scratch) noexcept nogil:
    """A block of tiles."""
    cdef const Blocks *job = <const Blocks *>untyped
    cdef long group
    transform_input(job, block, 0, job.C, scratch, scratch + job.strip_at)
    for group in range(job.groups):
        multiply_group(job, block, group, scratch, scratch)


cdef void input_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """A part of the channels of a shared block."""
    cdef const Blocks *job = <const Blocks *>untyped
    cdef long block = index // job.parts_in, part = index % job.parts_in
    transform_input(job, block, part * job.C // job.parts_in, (part + 1) * job.C // job.parts_in,
                    job.shared + block % job.held * job.block_bytes, scratch + job.strip_at)


cdef void output_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """Some panels of a shared block."""
    cdef const Blocks *job = <const Blocks *>untyped
    cdef long block = index // job.groups
    multiply_group(job, block, index % job.groups, job.shared + block % job.held * job.block_bytes, scratch)


cdef Buffer elements(str dtype, tuple values):
    """A C copy of numbers, in the type of the arrays."""
    cdef Buffer buffer = Buffer(len(values) * 8)
    cdef Py_ssize_t i
    for i, value in enumerate(values):
        if dtype == "float32":
            (<float *>buffer.data)[i] = value
        else:
            (<double *>buffer.data)[i] = value
    return buffer


@lru_cache(maxsize=64)
def numbers_of(str dtype, transform):
    """Coefficients, powers and filter of a transform, once for all layers."""
    coefficients, powers = elements(dtype, transform.coefficients), elements(dtype, transform.powers)
    return coefficients, powers, elements("float64", transform.filter)


cdef class WinogradConvolution(Kernel):
    """A ConvSpec cut by a Winograd tiling for one ISA. Holds tables, no weights; many threads may run() it at once."""

    cdef Blocks job
    cdef list owners
    cdef size_t scratch_size  # of a thread that has blocks of its own

    def __init__(self, spec, tiling, str isa):
        cdef Blocks *job = &self.job
        cdef const cconv_kernels *kernels = kernels_of(isa, spec.dtype)
        cdef long line, outputs, last, strip, rows
        cdef Buffer zeros
        self.owners = []
        job.kernels = kernels
        job.itemsize = 4 if spec.dtype == "float32" else 8
        job.finish, job.far_images = finish_of(spec.activation), tiling.far_images
        job.C, job.K, job.panels, job.points = spec.C, spec.K, tiling.panels, tiling.points
        job.chain = ceil_div(job.C, tiling.chains)
        job.group, job.groups, job.held = tiling.group, ceil_div(tiling.panels, tiling.group), tiling.held
        job.pixel_lanes = tiling.lanes == "pixels"
        job.tiles = tiling.tiles
        job.pitch = ceil_div(job.tiles, kernels.lanes) * kernels.lanes
        job.strip = CCONV_STRIP // job.itemsize
        # One cache line more from point to point: powers of two would meet in the same sets of a cache.
        line = 64 // job.itemsize
        job.point_in = job.C * job.pitch + line
        outputs = ceil_div(job.K, job.panels) if job.pixel_lanes else (
            ceil_div(ceil_div(job.K, kernels.lanes), job.panels) * kernels.lanes)
        job.tile_out, job.output_out = (1, job.pitch) if job.pixel_lanes else (job.group * outputs, 1)
        job.point_out = (job.group * outputs * job.pitch if job.pixel_lanes else job.tiles * job.tile_out) + line
        last = panel_begin(job, job.panels - 1)
        job.fused, job.taps = tiling.fused, spec.R * spec.S
        job.point_weights = (outputs if job.fused else last + panel_width(job, job.K - last)) * job.C + line
        job.how.H, job.how.W, job.how.P, job.how.Q = spec.H, spec.W, spec.P, spec.Q
        job.how.top, job.how.left = spec.padding[:2]
        job.how.taps, job.how.stride = tiling.rows.r, tiling.rows.stride
        job.how.dilation_h, job.how.dilation_w = spec.dilation
        job.how.tiles_high = ceil_div(ceil_div(spec.P, job.how.dilation_h), tiling.rows.m)
        job.how.tiles_wide = ceil_div(ceil_div(spec.Q, job.how.dilation_w), tiling.columns.m)
        job.how.map_stride = spec.K * spec.P * spec.Q
        zeros = Buffer(spec.W * job.itemsize)
        memset(zeros.data, 0, zeros.nbytes)
        job.how.zeros = zeros.data
        self.owners.append(zeros)
        self._tables(&job.how.down, spec.dtype, tiling.rows)
        self._tables(&job.how.across, spec.dtype, tiling.columns)
        job.offset = int_table(self.owners, range(0, job.C * job.pitch, job.pitch))
        job.block_bytes = lines((job.points * job.point_in + kernels.lanes) * job.itemsize)
        job.products_at = job.block_bytes
        job.strip_at = job.products_at + lines((job.points * job.point_out + kernels.lanes) * job.itemsize)
        # Every tile may stand alone in its row; gathering reads up to 5 vectors too far, and the last row to its end.
        strip = job.how.down.alpha * (job.strip * job.how.across.alpha + 6 * kernels.lanes)
        rows = 0 if job.pixel_lanes else job.how.down.m * (CCONV_RUN * job.how.across.m + kernels.lanes) * kernels.lanes
        job.filters_at = job.strip_at + lines(max(strip, rows) * job.itemsize)
        self.scratch_size = job.filters_at + (self._filter_bytes() if job.fused else 0)

    cdef size_t _filter_bytes(self):
        """Bytes of transformed filters: of a panel if they are transformed where they are used, else of all."""
        return lines((self.job.points * self.job.point_weights + self.job.kernels.lanes) * self.job.itemsize)

    cdef int _tables(self, cconv_transform *to, str dtype, transform) except -1:
        cdef Buffer coefficients, powers, filter
        coefficients, powers, filter = numbers = numbers_of(dtype, transform)
        self.owners.append(numbers)
        to.m, to.alpha = transform.m, transform.alpha
        to.coefficients, to.powers, to.filter = coefficients.data, powers.data, <const double *>filter.data
        return 0

    cdef long _blocks(self, long images):
        return ceil_div(self._count(images), self.job.tiles)

    cdef long _count(self, long images):
        """Tiles of so many images."""
        cdef const cconv_winograd *how = &self.job.how
        return images * how.dilation_h * how.dilation_w * how.tiles_high * how.tiles_wide

    cpdef size_t scratch_bytes(self, long images, int threads):
        if self.job.held:
            return min(self.job.held, self._blocks(images)) * self.job.block_bytes + threads * self._own()
        return threads * self.scratch_size

    cdef size_t _own(self):
        """Bytes of a thread's scratch without room for transformed input."""
        return self.scratch_size - self.job.products_at

    cpdef size_t packed_bytes(self):
        return 0 if self.job.fused else self._filter_bytes()

    def pack(self, cnp.ndarray weight not None, int threads=1, Room room=None):
        """The transformed panels of a C-ordered (K, C, R, S) weight, as run() wants them; the weight itself where run()
        transforms it."""
        cdef Filters job
        cdef Buffer packed
        if self.job.fused:
            return borrow(weight)
        packed = Buffer(self.packed_bytes()) if room is None else room.take(self.packed_bytes())
        job.blocks = &self.job
        job.weight, job.packed = data_of(weight), packed.data
        if packed.nbytes < SHARED_PACKING:
            threads = 1
        job.parts = 1 if threads == 1 else min(self.job.C, ceil_div(PARTS * threads, self.job.panels))
        with nogil:
            share_tasks(filter_task, &job, self.job.panels * job.parts, threads)
        return packed

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = activation(conv(x) + bias + second); x with its rows in one piece."""
        cdef Blocks job = self.job
        cdef size_t own = self._own()
        cdef long begin, end
        cdef char *scratches
        cdef const void *kept
        job.count, job.blocks = self._count(call.images), self._blocks(call.images)
        job.x = call.x
        job.how.image_stride, job.how.channel_stride, job.how.row_stride = call.x_n, call.x_c, call.x_h
        job.weights, job.bias, job.residual, job.y = call.weights, call.bias, call.second, call.y
        job.finish.past = call.second == NULL and call.images >= job.far_images
        if not job.held:
            return phases.add(
                whole_task, phases.keep(&job, sizeof(job)), 0, job.blocks, call.scratch, self.scratch_size)
        job.held = min(job.held, job.blocks)
        job.shared = call.scratch
        scratches = job.shared + job.held * job.block_bytes
        job.parts_in = min(job.C, ceil_div(PARTS * max(call.threads, 1), job.held))
        # A thread's scratch has no room of its own for transformed input: its parts move to the front.
        job.filters_at -= job.products_at
        job.strip_at -= job.products_at
        job.products_at = 0
        kept = phases.keep(&job, sizeof(job))
        for begin in range(0, job.blocks, job.held):
            end = min(begin + job.held, job.blocks)
            phases.add(input_task, kept, begin * job.parts_in, end * job.parts_in, scratches, own)
            phases.add(output_task, kept, begin * job.groups, end * job.groups, scratches, own)
        return 0
