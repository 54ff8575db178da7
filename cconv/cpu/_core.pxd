# Core: what the compiled steps share (see _core.pyx), for cimport.

cimport numpy as cnp
from libc.stdint cimport int32_t

from .kernels cimport cconv_finish, cconv_kernels

ctypedef void (*Task)(const void *job, long index, char *scratch) noexcept nogil

cdef enum:
    LINE = 64  # bytes of a cache line

cdef class Buffer:
    cdef char *data
    cdef readonly size_t nbytes

cdef const cconv_kernels *kernels_of(str isa_name, str dtype) except NULL
cdef const int32_t *int_table(list owners, values) except NULL
cdef cconv_finish finish_of(activation)
cdef void share(Task task, const void *job, long tasks, char *scratch, size_t scratch_size, int threads) noexcept nogil


cdef inline size_t lines(size_t nbytes) noexcept nogil:
    """Rounded up to whole cache lines."""
    return (nbytes + LINE - 1) // LINE * LINE


cdef inline long ceil_div(long a, long b) noexcept nogil:
    return (a + b - 1) // b


cdef inline char *data_of(cnp.ndarray array) noexcept:
    return <char *>cnp.PyArray_DATA(array) if array is not None else NULL
