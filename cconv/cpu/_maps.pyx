# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Maps: the loops of the steps without weights, pooling and elementwise.

In: a PoolSpec or PointwiseSpec, C-ordered NumPy arrays that the caller has checked.  Out: numbers in y.
The arithmetic is in kernels/pool.inc.c and finish.inc.c.
"""

cimport numpy as cnp

from ._core cimport Buffer, ceil_div, compute, data_of, finish_of, int_table, kernels_of, lines
from .kernels cimport cconv_finish, cconv_kernels, cconv_pool

cnp.import_array()


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


cdef class Pooling:
    """A PoolSpec for one ISA."""

    cdef Pool job
    cdef list owners
    cdef size_t scratch_size

    def __init__(self, spec, str isa):
        cdef Pool *job = &self.job
        cdef cconv_pool *how = &job.how
        cdef size_t itemsize = 4 if spec.dtype == "float32" else 8
        rows, columns = spec.rows, spec.columns
        self.owners = []
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

    def scratch_bytes(self, long images, int threads):
        """Bytes of scratch that a run needs."""
        return self.scratch_size * threads

    def run(self, cnp.ndarray x not None, weights, bias, second, cnp.ndarray y not None, int threads,
            Buffer scratch not None):
        """y = pool(x); both C-ordered. A pool has no weights, no bias and no second image."""
        cdef Pool job = self.job
        cdef long maps = x.shape[0] * x.shape[1]
        job.x, job.y = data_of(x), data_of(y)
        compute(pool_task, &job, maps, scratch.data, self.scratch_size, threads)


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


cdef class Pointwise:
    """A PointwiseSpec for one ISA."""

    cdef Elements job

    def __init__(self, spec, str isa):
        self.job.kernels = kernels_of(isa, spec.dtype)
        self.job.how = finish_of(spec.activation)
        self.job.itemsize = 4 if spec.dtype == "float32" else 8

    def scratch_bytes(self, long images, int threads):
        """None is needed."""
        return 0

    def run(self, cnp.ndarray x not None, weights, bias, cnp.ndarray second, cnp.ndarray y not None, int threads,
            Buffer scratch not None):
        """y = activation(x [+ second]); all C-ordered. There are no weights and no bias."""
        cdef Elements job = self.job
        job.count = x.size
        job.x, job.other, job.y = data_of(x), data_of(second), data_of(y)
        compute(elements_task, &job, ceil_div(job.count, RUN), scratch.data, 0, threads)
