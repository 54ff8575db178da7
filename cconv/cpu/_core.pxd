# Core: what the compiled steps share (see _core.pyx, _pool.pyx and _team.pyx), for cimport.

cimport numpy as cnp
from libc.stdint cimport int32_t

from ._pool cimport LINE, Buffer, borrow
from ._team cimport Task, share
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


cdef inline void compute(
    Task task, const void *job, long tasks, char *scratch, size_t scratch_size, int threads
) noexcept:
    """share() without the GIL, or with it if `threads` is 0 (see threads_for)."""
    if threads:
        with nogil:
            share(task, job, tasks, scratch, scratch_size, threads)
    else:
        share(task, job, tasks, scratch, scratch_size, 1)
