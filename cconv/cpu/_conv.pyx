# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Conv: the loops of a direct convolution over its tiles.

In: a ConvSpec and its Direct tiling, packed weights, images that the caller has checked.  Out: numbers in y.
The arithmetic is in kernels/pack.inc.c, multiply.inc.c and finish.inc.c, the decisions in planning/direct.py.
"""

cimport numpy as cnp
from libc.stdint cimport int32_t
from libc.string cimport memcpy, memset

from ._core cimport (
    Buffer, Call, Kernel, Phases, Room, borrow, ceil_div, data_of, finish_of, int_table, kernels_of, lines, share_tasks,
)
from .kernels cimport cconv_finish, cconv_gaps, cconv_kernels, cconv_rows

cnp.import_array()

cdef enum:
    RELU6 = 2  # in enum cconv_activation: those up to it need no look at anything but the sum
    SHARED_PACKING = 1 << 18  # bytes of weights from which on threads share their packing


cdef struct Conv:
    const cconv_kernels *kernels
    cconv_finish finish
    int itemsize, pixel_lanes, across_images, narrow
    int paired  # columns have two phases, side by side in the image: packed in one pass
    int fused  # the multiplication itself finishes rows
    int joined  # rows are one run of pixels, the gaps between them included
    int solid  # they are without a gap: one run of pixels in the output, too
    int in_place  # the tile is a piece of the image, which is not packed
    int unpacked  # weights are packed by the task that multiplies with them, chain by chain
    # Sizes: of the spec (with a 1x1 kernel the image may be one long row), per group, of a tile.
    long N, C, H, W, K, R, S, P, Q, groups, group_channels, group_outputs, depth
    long stride_h, stride_w, top, left, dilation_h, dilation_w
    long tile_p, tile_q, tile_pixels, tile_rows, pitch, plane, parts, pieces, far_images
    long chains, chain, at_once  # how many; the products of each but the last, and of a call with lanes "channels"
    long row_blocks, column_blocks
    const int32_t *row_start
    const int32_t *column_start
    const int32_t *offset
    const int32_t *image_offset  # the same in an image that is one long row
    cconv_gaps gaps  # those between joined rows
    long shared  # zeros that a packed row has in common with the next one
    # Work: tiles down and across an image, panels of a group.
    long tiles_p, tiles_q, panels
    # Scratch: bytes before the sums, before the transposed sums, and before the weights of a chain.
    size_t sums_at, flipped_at, weights_at
    # Memory: strides in bytes.
    const char *x
    Py_ssize_t x_n, x_c, x_h, x_w
    const char *weights
    const char *before  # scale and shift of the input's channels behind the panels, or NULL
    const char *bias
    const char *residual
    char *y


cdef double bias_of(const Conv *job, long k) noexcept nogil:
    if job.bias == NULL:
        return 0
    return (<const float *>job.bias)[k] if job.itemsize == 4 else (<const double *>job.bias)[k]


cdef void finish_map(const Conv *job, long n, long k, long p, long q, long rows, long columns, const char *sums,
                     long sums_pitch) noexcept nogil:
    """rows x columns outputs of map k of image n from (p, q) on, from their sums to the output."""
    cdef Py_ssize_t at = ((n * job.K + k) * job.P * job.Q + p * job.Q + q) * job.itemsize
    cdef const char *residual = job.residual + at if job.residual != NULL else NULL
    job.kernels.finish(&job.finish, bias_of(job, k), rows, columns, sums, sums_pitch, residual, job.y + at, job.Q)


cdef void preactivate_tile(const Conv *job, long n, long first, long last, long q, char *tile) noexcept nogil:
    """Pixels q .. of the long row of channels first .. last-1, normed and rectified."""
    cdef long count = min(job.tile_q, job.Q - q), c, j
    cdef const char *x = job.x + n * job.x_n + first * job.x_c + q * job.x_w
    cdef Py_ssize_t stride = job.x_c
    if job.x_w != job.itemsize:
        for c in range(last - first):
            for j in range(count):
                memcpy(tile + (c * job.plane + j) * job.itemsize, x + c * job.x_c + j * job.x_w, job.itemsize)
        x, stride = tile, job.plane * job.itemsize
    job.kernels.preactivate(
        last - first, count, stride, job.before + first * job.itemsize, job.before + (job.C + first) * job.itemsize, x,
        tile, job.plane)


cdef void pack_tile(const Conv *job, long n, long group, long first, long last, long p, long q, long tile_p,
                    char *tile) noexcept nogil:
    """The input that outputs (p, q) .. need, of channels first .. last-1 of a group, sorted into blocks, zeros outside
    the image."""
    cdef cconv_rows rows
    cdef long a, b
    if job.before != NULL:
        preactivate_tile(job, n, first, last, q, tile)
        return
    rows.channels, rows.plane = last - first, job.plane
    rows.height = tile_p + job.tile_rows - job.tile_p
    rows.width = rows.pitch = job.pitch
    rows.pair = job.tile_rows * job.pitch if job.paired else 0
    rows.after = job.shared
    rows.row_step = job.stride_h
    rows.column_step = job.stride_w
    rows.source_height = job.H
    rows.source_width = job.W
    rows.channel_stride, rows.row_stride, rows.column_stride = job.x_c, job.x_h, job.x_w
    for a in range(job.row_blocks):
        rows.top = p * job.stride_h - job.top + job.row_start[a]
        for b in range(1 if job.paired else job.column_blocks):
            rows.left = q * job.stride_w - job.left + job.column_start[b]
            job.kernels.pack_rows(
                &rows, job.x + n * job.x_n + (group * job.group_channels + first) * job.x_c,
                tile + (a * job.column_blocks + b) * job.tile_rows * job.pitch * job.itemsize)


cdef void pack_images(const Conv *job, long first, long images, long group, char *tile) noexcept nogil:
    """The whole window of `images` images side by side: pixel i of the tile is image first + i."""
    cdef cconv_rows rows
    cdef long c, r, h
    cdef char *to
    rows.channels, rows.plane, rows.channel_stride, rows.pair, rows.after = 1, 0, 0, 0, 0
    rows.height = job.S
    rows.width = images
    rows.pitch = job.pitch
    rows.top = -job.left
    rows.left = first
    rows.row_step = job.dilation_w
    rows.column_step = 1
    rows.source_height = job.W
    rows.source_width = job.N
    rows.row_stride = job.x_w
    rows.column_stride = job.x_n
    for c in range(job.group_channels):
        for r in range(job.R):
            h = r * job.dilation_h - job.top
            to = tile + (c * job.R + r) * job.S * job.pitch * job.itemsize
            if h < 0 or h >= job.H:
                memset(to, 0, job.S * job.pitch * job.itemsize)
            else:
                job.kernels.pack_rows(
                    &rows, job.x + (group * job.group_channels + c) * job.x_c + h * job.x_h, to)


cdef void channels_finish(
    const Conv *job, long n, long k, long outputs, long width, long p, long q, long tile_p, long tile_q,
    const char *sums, char *flipped
) noexcept nogil:
    """The sums of a panel, of which `outputs` of `width` are real, to maps k .. of the output."""
    cdef long lanes = job.kernels.lanes, pixels = tile_p * tile_q, pitch = (pixels + lanes - 1) // lanes * lanes, o, i
    if job.across_images:  # an image's outputs lie side by side already
        for i in range(pixels):
            for o in range(outputs):
                finish_map(job, n + i, k + o, 0, 0, 1, 1, sums + (i * width + o) * job.itemsize, 0)
        return
    job.kernels.transpose(pixels, width, sums, width, flipped, pitch)
    for o in range(outputs):
        finish_map(job, n, k + o, p, q, tile_p, tile_q, flipped + o * pitch * job.itemsize, tile_q)


cdef void channels_panels(
    const Conv *job, long n, long group, long first, long last, long p, long q, long tile_p, long tile_q, char *scratch
) noexcept nogil:
    """Panels first .. last-1 of a group's output channels over a tile: pack, multiply, transpose, finish.

    In pieces of the input channels, a few chains each: the tile is then packed piece by piece, and the sums of all
    panels wait for the last one. A channel that two pieces share is packed twice. In place, nothing is packed."""
    cdef const cconv_kernels *kernels = job.kernels
    cdef long lanes = kernels.lanes, vectors = (job.group_outputs + lanes - 1) // lanes
    cdef long window = job.R * job.S, pixels = tile_p * tile_q
    # Rows without a gap are one run of pixels.
    cdef long runs = 1 if job.pitch == tile_q else tile_p, run_pixels = pixels // runs
    cdef const int32_t *offset = job.image_offset if job.in_place else job.offset
    cdef long piece, panel, first_k, last_k, begin, some, run, channel, k, width, padded
    cdef const char *panel_weights
    cdef const char *weights
    cdef const char *tile
    cdef char *sums
    for piece in range(job.pieces):
        first_k = piece * job.chains // job.pieces * job.chain
        last_k = min(job.depth, (piece + 1) * job.chains // job.pieces * job.chain)
        channel = first_k // window
        tile = scratch - channel * job.plane * job.itemsize  # of channel 0
        if job.in_place:
            tile = job.x + n * job.x_n + group * job.group_channels * job.x_c + q * job.itemsize
        elif job.across_images:
            pack_images(job, n, tile_q, group, scratch)
        else:
            pack_tile(job, n, group, channel, (last_k + window - 1) // window, p, q, tile_p, scratch)
        for panel in range(first, last):
            k = panel * vectors // job.panels * lanes
            width = (panel + 1) * vectors // job.panels * lanes - k
            padded = job.group_outputs if job.unpacked else vectors * lanes
            panel_weights = job.weights + (group * padded + k) * job.depth * job.itemsize
            sums = scratch + job.sums_at
            if job.pieces > 1:
                sums += k * job.tile_pixels * job.itemsize
            begin = first_k
            while begin < last_k:
                some = min(job.at_once, last_k - begin)
                if job.unpacked:
                    weights = scratch + job.weights_at
                    kernels.pack_panel(min(width, job.group_outputs - k), width, some, job.depth,
                                       panel_weights + begin * job.itemsize, scratch + job.weights_at)
                else:
                    weights = panel_weights + begin * width * job.itemsize
                for run in range(runs):
                    kernels.multiply_channels(
                        <int>run_pixels, <int>(width // lanes), some, job.chain,
                        offset + begin, tile + run * job.pitch * job.itemsize, weights,
                        sums + run * run_pixels * width * job.itemsize, width, begin > 0)
                begin += some
            if piece == job.pieces - 1:
                channels_finish(job, n, group * job.group_outputs + k, min(width, job.group_outputs - k), width, p, q,
                                tile_p, tile_q, sums, scratch + job.flipped_at)


cdef void pixels_panel(
    const Conv *job, long n, long group, long panel, long p, long q, long tile_p, long tile_q, const char *tile,
    const int32_t *offset, char *scratch
) noexcept nogil:
    """One panel of output channels over a tile: multiply, finish.

    Fused, sums end in the output. Joined, the tile is read as one run of pixels: those between rows are dropped."""
    cdef const cconv_kernels *kernels = job.kernels
    cdef long lanes = kernels.lanes
    cdef long runs = 1 if job.joined else tile_p
    cdef long vectors = ceil_div((tile_p - 1) * job.pitch + tile_q if job.joined else tile_q, lanes)
    cdef long sums_pitch = runs * vectors * lanes
    cdef long first = panel * job.group_outputs // job.panels
    cdef long outputs = (panel + 1) * job.group_outputs // job.panels - first
    cdef long k = group * job.group_outputs + first
    cdef const char *weights = job.weights + k * job.depth * job.itemsize
    cdef char *sums = scratch + job.sums_at
    cdef long map = job.P * job.Q, run, chain, begin, depth, o
    cdef Py_ssize_t at = ((n * job.K + k) * map + p * job.Q + q) * job.itemsize, row
    cdef char *y = job.y + at
    for run in range(runs if job.fused else 0):
        row = run * job.Q * job.itemsize
        kernels.multiply_row(
            <int>outputs, job.narrow, <int>(tile_p // runs * tile_q), &job.gaps if job.joined else NULL, job.depth,
            job.chain, offset,
            tile + run * job.pitch * job.itemsize, weights, sums,
            job.bias + k * job.itemsize if job.bias != NULL else NULL, &job.finish,
            job.residual + at + row if job.residual != NULL else NULL, y + row, map)
    if job.fused:
        return
    if not job.finish.past:
        for o in range(outputs):
            kernels.expect(tile_p, tile_q, y + o * map * job.itemsize, job.Q)
    for chain in range(job.chains):
        begin, depth = chain * job.chain, min(job.chain, job.depth - chain * job.chain)
        for run in range(runs):
            kernels.multiply_pixels(
                <int>outputs, <int>vectors, depth, depth, offset + begin, tile + run * job.pitch * job.itemsize,
                weights + begin * outputs * job.itemsize, sums + run * vectors * lanes * job.itemsize, sums_pitch,
                begin > 0)
    for o in range(outputs):
        finish_map(job, n, k + o, p, q, tile_p, tile_q, sums + o * sums_pitch * job.itemsize,
                   job.pitch if job.joined else vectors * lanes)


cdef void pixels_panels(
    const Conv *job, long n, long group, long first, long last, long p, long q, long tile_p, long tile_q, char *scratch
) noexcept nogil:
    """Panels first .. last-1 of a group's output channels over a tile: pack, unless it can be read where it lies, then
    multiply and finish. Rows that need one register tile are read to the end of their last vector, which only a packed
    tile has."""
    cdef const char *tile = scratch
    cdef const int32_t *offset = job.offset
    cdef long lanes = job.kernels.lanes, panel
    cdef long widest = 1 if job.narrow else job.kernels.widest[job.group_outputs // job.panels - 1]
    if job.in_place and job.fused and (tile_q % lanes == 0 or tile_q > widest * lanes):
        tile = job.x + n * job.x_n + group * job.group_channels * job.x_c + q * job.itemsize
        offset = job.image_offset
    elif job.across_images:
        pack_images(job, n, tile_q, group, scratch)
    else:
        pack_tile(job, n, group, 0, job.group_channels, p, q, tile_p, scratch)
    if job.solid:
        tile_p, tile_q = 1, tile_p * tile_q
    for panel in range(first, last):
        pixels_panel(job, n, group, panel, p, q, tile_p, tile_q, tile, offset, scratch)


cdef void conv_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """Part `index % parts` of the channels of a tile: (image, tile row, tile column, part), the last one fastest."""
    cdef const Conv *job = <const Conv *>untyped
    cdef long part = index % job.parts, tile = index // job.parts
    cdef long per_image = job.tiles_p * job.tiles_q
    cdef long units = job.groups * job.panels
    cdef long unit, group, stop, first, last, n, p, q, tile_p, tile_q
    if job.across_images:
        n, p, q = tile * job.tile_q, 0, 0
        tile_p, tile_q = 1, min(job.tile_q, job.N - n)
    else:
        n = tile // per_image
        p, q = tile % per_image // job.tiles_q * job.tile_p, tile % job.tiles_q * job.tile_q
        tile_p, tile_q = min(job.tile_p, job.P - p), min(job.tile_q, job.Q - q)
    cdef long end = (part + 1) * units // job.parts
    unit = part * units // job.parts
    while unit < end:
        group = unit // job.panels
        stop = min(end, (group + 1) * job.panels)
        first, last = unit - group * job.panels, stop - group * job.panels
        if job.pixel_lanes:
            pixels_panels(job, n, group, first, last, p, q, tile_p, tile_q, scratch)
        else:
            channels_panels(job, n, group, first, last, p, q, tile_p, tile_q, scratch)
        unit = stop
    if job.finish.past:
        job.kernels.settle()


cdef struct Panels:
    const Conv *conv
    long padded  # outputs of a group in its panels
    const char *weight
    char *packed


cdef void pack_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """A panel of weights."""
    cdef const Panels *panels = <const Panels *>untyped
    cdef const Conv *job = panels.conv
    cdef long group = index // job.panels, panel = index % job.panels, lanes = job.kernels.lanes
    cdef long row = job.depth * job.itemsize, o, end, width, vectors
    if job.pixel_lanes:
        o, end = panel * job.group_outputs // job.panels, (panel + 1) * job.group_outputs // job.panels
        width = end - o
    else:
        vectors = (job.group_outputs + lanes - 1) // lanes
        o = panel * vectors // job.panels * lanes
        width = (panel + 1) * vectors // job.panels * lanes - o
        end = min(o + width, job.group_outputs)
    job.kernels.pack_panel(
        end - o, width, job.depth, job.depth, panels.weight + (group * job.group_outputs + o) * row,
        panels.packed + (group * panels.padded + o) * row)


cdef class Convolution(Kernel):
    """A ConvSpec cut by a Direct tiling for one ISA. Holds tables, no weights; many threads may run() it at once."""

    cdef Conv job
    cdef size_t scratch_size
    cdef list owners
    cdef long padded  # outputs of a group in its panels
    cdef bint preactivated

    def __init__(self, spec, tiling, str isa):
        cdef Conv *job = &self.job
        cdef const cconv_kernels *kernels = kernels_of(isa, spec.dtype)
        self.owners = []
        job.kernels = kernels
        job.itemsize = 4 if spec.dtype == "float32" else 8
        job.pixel_lanes = tiling.lanes == "pixels"
        job.across_images, job.narrow = tiling.across_images, tiling.narrow
        job.in_place, job.unpacked = tiling.in_place, tiling.unpacked
        job.C, job.K, job.R, job.S, job.groups = spec.C, spec.K, spec.R, spec.S, spec.groups
        job.H, job.W, job.P, job.Q = (1, spec.H * spec.W, 1, spec.P * spec.Q) if tiling.flat else (
            spec.H, spec.W, spec.P, spec.Q)
        job.group_channels, job.group_outputs, job.depth = spec.C // spec.groups, spec.K // spec.groups, spec.depth
        job.stride_h, job.stride_w = spec.stride
        job.top, job.left = spec.padding[:2]
        job.dilation_h, job.dilation_w = spec.dilation
        job.tile_p, job.tile_q, job.tile_rows, job.pitch = (
            tiling.tile_p, tiling.tile_q, tiling.rows.extent, tiling.pitch)
        job.plane, job.shared, job.parts = tiling.plane, tiling.columns.shared, tiling.channel_parts
        job.chains, job.chain = tiling.chains, ceil_div(job.depth, tiling.chains)
        whole = job.narrow or (kernels.kept and job.pitch == job.tile_q and not job.unpacked)
        job.at_once = job.depth if whole else job.chain
        job.far_images, job.pieces, job.tile_pixels = tiling.far_images, tiling.pieces, tiling.tile_p * tiling.tile_q
        job.row_blocks, job.column_blocks = len(tiling.rows.starts), len(tiling.columns.starts)
        job.paired = spec.stride[1] == 2 and tuple(tiling.columns.starts) == (0, 1)
        job.row_start = int_table(self.owners, tiling.rows.starts)
        job.column_start = int_table(self.owners, tiling.columns.starts)
        job.offset = int_table(self.owners, tiling.offsets(spec))
        if tiling.in_place:
            job.image_offset = int_table(self.owners, range(0, job.group_channels * job.W, job.W))
        job.solid = tiling.joined and job.pitch == job.tile_q
        job.joined = tiling.joined and not job.solid
        if job.joined:
            at, before = tiling.gaps(kernels.lanes)
            job.gaps.at, job.gaps.before = int_table(self.owners, at), int_table(self.owners, before)
        job.tiles_p, job.tiles_q = ceil_div(job.P, job.tile_p), ceil_div(job.Q, job.tile_q)
        job.panels = tiling.panels
        job.finish = finish_of(spec.activation)
        self.preactivated = spec.preactivated
        self.padded = job.group_outputs if job.pixel_lanes else (
            ceil_div(job.group_outputs, kernels.lanes) * kernels.lanes)
        # Sums of a panel: whole vectors per row of pixels; lanes "channels" need them twice (computed, transposed).
        cdef size_t vectors = ceil_div(max(job.pitch, job.tile_q), kernels.lanes)
        cdef size_t pixels = (job.tile_p * vectors + 1) * kernels.lanes
        cdef size_t panel = (
            ceil_div(job.group_outputs, job.panels) if job.pixel_lanes else kernels.wide_vectors * kernels.lanes)
        # In pieces: the channels of one, and the sums of all panels.
        cdef long products = ceil_div(job.chains, job.pieces) * ceil_div(job.depth, job.chains)
        cdef size_t channels = min(job.group_channels, ceil_div(products, job.R * job.S) + 1)
        cdef size_t held = panel if job.pieces == 1 else job.group_outputs + kernels.lanes
        cdef size_t tile = channels * job.plane if not job.across_images else job.depth * job.pitch
        job.sums_at = lines((tile + (kernels.widest[0] + 1) * kernels.lanes) * job.itemsize)
        job.flipped_at = job.sums_at + lines(pixels * held * job.itemsize)
        job.weights_at = job.flipped_at + (0 if job.pixel_lanes else lines(pixels * panel * job.itemsize))
        self.scratch_size = job.weights_at
        if job.unpacked:
            self.scratch_size += lines(panel * ceil_div(job.depth, job.chains) * job.itemsize)

    cdef size_t panels_size(self):
        return self.job.groups * self.padded * self.job.depth * self.job.itemsize

    cpdef size_t packed_bytes(self):
        if self.job.unpacked:
            return 0
        return self.panels_size() + (2 * self.job.C * self.job.itemsize if self.preactivated else 0)

    cpdef size_t scratch_bytes(self, long images, int threads):
        return self.scratch_size * threads

    def pack(self, cnp.ndarray weight not None, int threads=1, cnp.ndarray before=None, Room room=None):
        """The panels of a C-ordered (K, C/G, R, S) weight, as run() wants them; behind them the (2, C) scale and shift
        of a preactivated convolution. The weight itself where run() packs it."""
        cdef Panels job
        cdef Buffer packed
        if self.job.unpacked:
            return borrow(weight)
        job.conv, job.padded = &self.job, self.padded
        packed = Buffer(self.packed_bytes()) if room is None else room.take(self.packed_bytes())
        job.weight, job.packed = data_of(weight), packed.data
        if before is not None:
            memcpy(packed.data + self.panels_size(), data_of(before), before.nbytes)
        if packed.nbytes < SHARED_PACKING:
            threads = 1
        with nogil:
            share_tasks(pack_task, &job, self.job.groups * self.job.panels, threads)
        return packed

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = activation(conv(x) + bias + second); x with any strides."""
        cdef Conv job = self.job
        cdef long tasks
        job.N = call.images
        job.x, job.x_n, job.x_c, job.x_h, job.x_w = call.x, call.x_n, call.x_c, call.x_h, call.x_w
        job.weights, job.bias, job.residual, job.y = call.weights, call.bias, call.second, call.y
        job.before = call.weights + self.panels_size() if self.preactivated else NULL
        job.in_place = job.in_place and job.x_w == job.itemsize and job.x_c == job.W * job.itemsize
        job.finish.past = call.second == NULL and job.N >= job.far_images
        job.fused = job.finish.activation <= RELU6
        tasks = job.parts * (
            ceil_div(job.N, job.tile_q) if job.across_images else job.N * job.tiles_p * job.tiles_q)
        return phases.add(conv_task, phases.keep(&job, sizeof(job)), 0, tasks, call.scratch, self.scratch_size)
