# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Core: what the compiled steps share: instruction sets, aligned memory, and the threads that run their tasks.

In: an ISA's name, sizes, a task and how many of them.  Out: tables of kernels, Buffers, tasks done.
The only file with OpenMP in it. Whoever calls holds the GIL; steps release it while their tasks run.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport int32_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.mman cimport madvise
from posix.stdlib cimport posix_memalign

from .kernels cimport cconv_finish, cconv_isa, cconv_kernels, cconv_list, cconv_select

from ..planning import ACTIVATIONS

#: Name -> value of enum cconv_activation.
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS, start=1)}


def instruction_sets():
    """(name, whether this processor runs it, vector bytes, tile rows, tile vectors, widest) of this build, best first."""
    cdef int usable = 0, i = 0
    cdef const cconv_isa *isa
    found = []
    while True:
        isa = cconv_list(i, &usable)
        if isa == NULL:
            return found
        found.append((isa.name.decode(), bool(usable), isa.vector_bytes, isa.f32.rows, isa.f32.vectors,
                      tuple(isa.f32.widest[o] for o in range(isa.f32.outputs))))
        i += 1


cdef const cconv_kernels *kernels_of(str isa_name, str dtype) except NULL:
    cdef bytes name = isa_name.encode()
    cdef const cconv_isa *isa = cconv_select(name)
    if isa == NULL:
        raise ValueError(f"isa: {isa_name} cannot run here")
    return &isa.f32 if dtype == "float32" else &isa.f64


cdef cconv_finish finish_of(activation):
    cdef cconv_finish how
    how.activation = 0 if activation is None else _ACTIVATION_CODES[activation.name]
    how.alpha = 0 if activation is None else activation.alpha
    return how


cdef enum:
    HUGE = 1 << 21  # bytes of a huge page
    MADV_HUGEPAGE = 14  # Linux; posix.mman does not know it


cdef class Buffer:
    """Memory aligned to a cache line, zeroed once."""

    def __cinit__(self, size_t nbytes):
        cdef void *memory = NULL
        if posix_memalign(&memory, LINE if nbytes < HUGE // 2 else HUGE, max(nbytes, <size_t>LINE)):
            raise MemoryError(f"could not allocate {nbytes} bytes")
        if nbytes >= HUGE // 2:  # transformed tiles lie far apart: small pages would miss the TLB at each
            madvise(memory, nbytes, MADV_HUGEPAGE)
        self.data = <char *>memory
        self.nbytes = nbytes
        memset(self.data, 0, nbytes)

    def __dealloc__(self):
        free(self.data)


cdef const int32_t *int_table(list owners, values) except NULL:
    """A C copy of a sequence of ints, owned by a Buffer that joins `owners`."""
    cdef Buffer buffer = Buffer(len(values) * sizeof(int32_t))
    cdef int32_t *table = <int32_t *>buffer.data
    cdef Py_ssize_t i
    for i, value in enumerate(values):
        table[i] = value
    owners.append(buffer)
    return table


cdef void share(Task task, const void *job, long tasks, char *scratch, size_t scratch_size, int threads) noexcept nogil:
    """Run tasks 0 .. tasks-1, each exactly once; a thread takes the next one when it is done with its last."""
    cdef long i
    if threads <= 1 or tasks <= 1:
        for i in range(tasks):
            task(job, i, scratch)
    else:
        for i in prange(tasks, schedule="dynamic", chunksize=1, num_threads=threads):
            task(job, i, scratch + threadid() * scratch_size)
