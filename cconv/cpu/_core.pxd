# Core: what the compiled steps share (see _core.pyx, _pool.pyx and _team.pyx), for cimport.

cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t

from ._pool cimport LINE, Buffer, borrow
from ._team cimport Phase, Task
from .kernels cimport cconv_finish, cconv_kernels

cdef const cconv_kernels *kernels_of(str isa_name, str dtype) except NULL
cdef const int32_t *int_table(list owners, values) except NULL
cdef cconv_finish finish_of(activation)


cdef inline size_t lines(size_t nbytes) noexcept nogil:
    """Rounded up to whole cache lines."""
    return (nbytes + LINE - 1) // LINE * LINE


cdef inline long ceil_div(long a, long b) noexcept nogil:
    return (a + b - 1) // b


cdef inline char *data_of(cnp.ndarray array) noexcept:
    return <char *>cnp.PyArray_DATA(array) if array is not None else NULL


cdef struct Call:  # what a kernel computes on: C-ordered images, but for x, whose strides are in bytes; NULL if there is none
    long images
    int threads, itemsize
    const char *x
    Py_ssize_t x_n, x_c, x_h, x_w
    const char *weights
    const char *bias
    const char *second
    char *y
    char *scratch


@cython.final
cdef class Phases:
    cdef Buffer memory
    cdef long count
    cdef Buffer chunk  # of jobs; full ones are in `chunks`
    cdef size_t used
    cdef list chunks
    cdef bint begins  # whether the next phase is the first of a step

    cdef void begin_step(self) noexcept
    cdef const void *keep(self, const void *job, size_t nbytes) except NULL
    cdef int add(self, Task task, const void *job, long begin, long end, char *scratch, size_t scratch_size) except -1
    cdef int run(self, int threads, cancel) except -1


cdef class Kernel:
    cpdef size_t scratch_bytes(self, long images, int threads)
    cdef int enter(self, Phases phases, const Call *call) except -1


cdef void share_tasks(Task task, const void *job, long tasks, int threads) noexcept nogil
