# Pool: recycled memory (see _pool.pyx), for cimport.

cimport numpy as cnp

cdef enum:
    LINE = 64  # bytes of a cache line
    HUGE = 1 << 21  # bytes of a huge page; blocks from here on begin at one

cdef class Buffer:
    cdef char *data
    cdef readonly size_t nbytes
    cdef size_t taken  # 0 if the memory is the owner's
    cdef object owner

cdef class Room:
    cdef Buffer whole
    cdef size_t nbytes, used

    cdef Buffer take(self, size_t nbytes)
    cdef void full(self) noexcept
    cdef void want_huge_pages(self, bint now) noexcept

cdef Buffer lease(double nbytes)
cdef Buffer workspace(double nbytes)
cdef Buffer borrow(cnp.ndarray array)
cdef cnp.ndarray empty(int rank, const cnp.npy_intp *shape, int type_number)
cdef cnp.ndarray part(Buffer memory, size_t begin, int rank, const cnp.npy_intp *shape, int type_number)
