# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Depthwise: the loops of a depthwise convolution over its maps.

In: a ConvSpec and its Depthwise tiling, weights, images that the caller has checked.  Out: numbers in y.
The arithmetic is in kernels/depthwise.inc.c, the decisions in planning/depthwise.py.
"""

cimport numpy as cnp
from libc.string cimport memcpy

from ._core cimport Buffer, Call, Kernel, Phases, Room, ceil_div, data_of, finish_of, kernels_of
from .kernels cimport cconv_depthwise, cconv_finish, cconv_kernels

cnp.import_array()

cdef enum:
    TASK = 1 << 14  # outputs that make a task


cdef struct Depth:
    const cconv_kernels *kernels
    cconv_depthwise how
    cconv_finish finish
    int itemsize
    long C, K, maps, run, parts  # maps of all images; in one task; parts of a map's rows
    size_t map_out
    Py_ssize_t x_n, x_c
    const char *x
    const char *weights
    const char *bias
    const char *residual
    char *y


cdef void depth_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """Some maps, counted over the images; or a part of the rows of one."""
    cdef const Depth *job = <const Depth *>untyped
    cdef long part = index % job.parts, begin = index // job.parts * job.run, end = min(begin + job.run, job.maps)
    cdef long map, n, k
    cdef size_t weight = job.how.size * job.how.size * job.itemsize
    cdef double bias = 0
    for map in range(begin, end):
        n, k = map // job.K, map % job.K
        if job.bias != NULL:
            bias = (<const float *>job.bias)[k] if job.itemsize == 4 else (<const double *>job.bias)[k]
        job.kernels.depthwise(
            &job.how, &job.finish, bias, part * job.how.P // job.parts, (part + 1) * job.how.P // job.parts,
            job.x + n * job.x_n + k * job.C // job.K * job.x_c, job.weights + k * weight,
            job.residual + map * job.map_out if job.residual != NULL else NULL, job.y + map * job.map_out)


cdef class DepthwiseConvolution(Kernel):
    """A ConvSpec with one input channel per group, for one ISA. Holds no weights; any number of threads may run it."""

    cdef Depth job

    def __init__(self, spec, tiling, str isa):
        cdef Depth *job = &self.job
        job.kernels = kernels_of(isa, spec.dtype)
        job.itemsize = 4 if spec.dtype == "float32" else 8
        job.C, job.K, job.parts = spec.C, spec.K, tiling.row_parts
        job.how.H, job.how.W, job.how.P, job.how.Q = spec.H, spec.W, spec.P, spec.Q
        job.how.size, job.how.stride = spec.R, spec.stride[0]
        job.how.top, job.how.left = spec.padding[:2]
        job.map_out = spec.P * spec.Q * job.itemsize
        job.finish = finish_of(spec.activation)

    cpdef size_t packed_bytes(self):
        return self.job.K * self.job.how.size * self.job.how.size * self.job.itemsize

    def pack(self, cnp.ndarray weight not None, int threads=1, Room room=None):
        """A copy of a C-ordered (K, 1, R, S) weight."""
        cdef Buffer packed = Buffer(self.packed_bytes()) if room is None else room.take(self.packed_bytes())
        memcpy(packed.data, data_of(weight), packed.nbytes)
        return packed

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = activation(conv(x) + bias + second); x with its rows in one piece."""
        cdef Depth job = self.job
        job.maps = call.images * job.K
        # Handing out a task costs as much as a small map.
        job.run = 1 if job.parts > 1 else max(
            1, min(job.maps // (4 * max(call.threads, 1)), TASK // (job.how.P * job.how.Q)))
        job.x, job.x_n, job.x_c, job.how.row_pitch = call.x, call.x_n, call.x_c, call.x_h // job.itemsize
        job.weights, job.bias, job.residual, job.y = call.weights, call.bias, call.second, call.y
        return phases.add(
            depth_task, phases.keep(&job, sizeof(job)), 0, ceil_div(job.maps, job.run) * job.parts, NULL, 0)
