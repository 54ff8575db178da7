# Core: what the compiled steps share (see _core.pyx, _pool.pyx and _team.pyx), for cimport.

cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t

from ._pool cimport LINE, Buffer, Room, borrow
from ._team cimport Ask, Phase, Task
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


# What a kernel computes on: C-ordered images, but for x, whose strides are in bytes; NULL if there is none.
cdef struct Call:
    long images
    int threads, itemsize
    const char *x
    Py_ssize_t x_n, x_c, x_h, x_w
    const char *weights
    const char *bias
    const char *second
    char *y
    char *scratch


cdef enum:
    JOB = 512  # bytes of a large job
    FEW = 2  # phases and jobs that need no memory of their own
    FEW_BYTES = 64 + 2 * (128 + 512)  # these, from a cache line on


@cython.final
cdef class Phases:
    cdef Phase *phases
    cdef long count, room
    cdef char *jobs
    cdef size_t used, jobs_size
    cdef list buffers  # where phases and jobs lie, unless they are few
    cdef char few[FEW_BYTES]
    cdef bint begins  # whether the next phase is the first of a step

    cdef void begin_step(self) noexcept
    cdef int hold(self, Buffer buffer) except -1
    cdef const void *keep(self, const void *job, size_t nbytes) except NULL
    cdef int add(self, Task task, const void *job, long begin, long end, char *scratch, size_t scratch_size) except -1
    cdef int run(self, int threads, cancel) except -1
    cdef void share(self, int threads, Ask ask, void *asked) noexcept


cdef class Kernel:
    cpdef size_t scratch_bytes(self, long images, int threads)
    cpdef size_t packed_bytes(self)
    cdef int enter(self, Phases phases, const Call *call) except -1


cdef void share_tasks(Task task, const void *job, long tasks, int threads) noexcept nogil
