# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Maps: the loops of the steps without weights, pooling and elementwise.

In: a PoolSpec or PointwiseSpec, C-ordered images that the caller has checked.  Out: numbers in y.
The arithmetic is in kernels/pool.inc.c and finish.inc.c.
"""

from ._core cimport Call, Kernel, Phases, ceil_div, finish_of, int_table, kernels_of, lines
from .kernels cimport cconv_finish, cconv_kernels, cconv_pool

from math import prod


cdef enum:
    LONGEST_PAD = 64  # columns beside a row in scratch; dilated windows may begin far outside

cdef struct Pool:
    const cconv_kernels *kernels
    cconv_pool how
    size_t map_in, map_out
    const char *x
    char *y


cdef void pool_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One map."""
    cdef const Pool *job = <const Pool *>untyped
    job.kernels.pool(&job.how, job.x + index * job.map_in, scratch, job.y + index * job.map_out)


cdef class Pooling(Kernel):
    """A PoolSpec for one ISA."""

    cdef Pool job
    cdef list owners
    cdef size_t scratch_size
    cdef long maps  # of an image

    def __init__(self, spec, str isa):
        cdef Pool *job = &self.job
        cdef cconv_pool *how = &job.how
        cdef size_t itemsize = 4 if spec.dtype == "float32" else 8
        rows, columns = spec.rows, spec.columns
        self.owners = []
        self.maps = spec.C
        job.kernels = kernels_of(isa, spec.dtype)
        how.average = spec.kind == "average"
        how.width = spec.W
        how.outputs_high, how.outputs_wide = len(rows.start), len(columns.start)
        how.row_start = int_table(self.owners, rows.start)
        how.row_stop = int_table(self.owners, rows.stop)
        how.row_extent = int_table(self.owners, rows.extent)
        how.column_start = int_table(self.owners, columns.start)
        how.column_stop = int_table(self.owners, columns.stop)
        how.column_extent = int_table(self.owners, columns.extent)
        how.row_step, how.column_step = rows.step, columns.step
        how.taps, how.left = columns.taps, columns.before
        how.right = max(
            0, (how.outputs_wide - 1) * columns.stride - how.left + (how.taps - 1) * how.column_step + 1 - how.width
        )
        how.stride = columns.stride if columns.stride in (1, 2) and max(how.left, how.right) <= LONGEST_PAD else 0
        if how.stride == 0:
            how.left = how.right = 0
        job.map_in = spec.H * spec.W * itemsize
        job.map_out = how.outputs_high * how.outputs_wide * itemsize
        self.scratch_size = lines(
            (how.left + how.width + how.right + how.outputs_wide + 4 * job.kernels.lanes) * sizeof(double)
        )

    cpdef size_t scratch_bytes(self, long images, int threads):
        return self.scratch_size * threads

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = pool(x). A pool has no weights, no bias and no second image."""
        cdef Pool job = self.job
        job.x, job.y = call.x, call.y
        return phases.add(
            pool_task, phases.keep(&job, sizeof(job)), 0, call.images * self.maps, call.scratch, self.scratch_size)


cdef enum:
    RUN = 1 << 14  # elements of a task

cdef struct Elements:
    const cconv_kernels *kernels
    cconv_finish how
    long count
    size_t itemsize
    const char *x
    const char *other
    char *y


cdef void elements_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One run of neighbouring elements."""
    cdef const Elements *job = <const Elements *>untyped
    cdef size_t at = index * RUN * job.itemsize
    cdef const char *other = job.other + at if job.other != NULL else NULL
    job.kernels.finish(&job.how, 0, 1, min(<long>RUN, job.count - index * RUN), job.x + at, 0, other, job.y + at, 0)


cdef class Pointwise(Kernel):
    """A PointwiseSpec for one ISA."""

    cdef Elements job
    cdef long size  # elements of an image

    def __init__(self, spec, str isa):
        self.size = prod(spec.image)
        self.job.kernels = kernels_of(isa, spec.dtype)
        self.job.how = finish_of(spec.activation)
        self.job.itemsize = 4 if spec.dtype == "float32" else 8

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = activation(x [+ second]). There are no weights and no bias."""
        cdef Elements job = self.job
        job.count = call.images * self.size
        job.x, job.other, job.y = call.x, call.second, call.y
        return phases.add(elements_task, phases.keep(&job, sizeof(job)), 0, ceil_div(job.count, RUN), NULL, 0)
