# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Pool: memory that is used again: results, scratch, arenas and packed weights, one pool for the process.

In: sizes.  Out: Buffers, and arrays that lie in one. When the last reference to a Buffer goes, and the array that lies
in it and every view of that array hold one, its memory is kept for the next of its size: fresh pages cost as much as
the arithmetic on them. What lies idle has a limit; beyond it the memory that was given back longest ago is freed.

The GIL is the lock: every function here holds it, and so does whoever drops the last reference, in any thread. A child
forked by Python therefore finds the lists whole; it drops what is idle (see memory.py), since writing to pages shared
with the parent would copy them. To give memory back needs no interpreter, so arrays may die while it ends.
"""

cimport cython
cimport numpy as cnp
from cpython.ref cimport Py_INCREF
from libc.math cimport ceil
from libc.stdint cimport SIZE_MAX
from libc.stdlib cimport free
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.stdlib cimport posix_memalign

cnp.import_array()

cdef extern from *:
    """
    #include <sys/mman.h>
    #ifdef MADV_HUGEPAGE
    #define cconv_want_huge_pages(at, size, now) ((void)madvise(at, size, now ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
    #else
    #define cconv_want_huge_pages(at, size, now) ((void)0)
    #endif
    """
    void cconv_want_huge_pages(void *at, size_t size, bint now) nogil
    int leading_zeros "__builtin_clzl"(unsigned long) nogil

cdef enum:
    LEAST = 1 << 12  # smaller memory is malloc's, and NumPy's: from here on this one takes no longer
    STEPS = 3  # 2^3 sizes from one power of two to the next: at most an eighth of a block is wasted
    SHELVES = 64 << STEPS


cdef double MOST_BYTES = 2.0**62

cdef struct Idle:  # stands at the beginning of idle memory
    Idle *newer  # of all
    Idle *older
    Idle *above  # on its shelf
    Idle *below
    size_t size

cdef Idle *tops[SHELVES]
cdef Idle *newest = NULL
cdef Idle *oldest = NULL
cdef size_t idle = 0
cdef size_t limit = 0  # memory.py sets it


cdef inline int shelf_of(size_t nbytes, size_t *size) noexcept:
    """The shelf for so many bytes, at least LEAST, and the bytes of every block on it."""
    cdef int step = 63 - leading_zeros(nbytes - 1) - STEPS
    cdef size_t steps = (nbytes - 1) >> step  # 8 .. 15
    size[0] = (steps + 1) << step
    return (step << STEPS) + <int>(steps & ((1 << STEPS) - 1))


cdef void unlink(Idle *block) noexcept:
    cdef size_t size
    cdef int shelf = shelf_of(block.size, &size)
    global newest, oldest, idle
    if block.newer != NULL:
        block.newer.older = block.older
    else:
        newest = block.older
    if block.older != NULL:
        block.older.newer = block.newer
    else:
        oldest = block.newer
    if block.above != NULL:
        block.above.below = block.below
    else:
        tops[shelf] = block.below
    if block.below != NULL:
        block.below.above = block.above
    idle -= size


cdef void release(void *memory, size_t size) noexcept:
    if size >= HUGE:
        munmap(memory, size)
    else:
        free(memory)


cdef void shrink(size_t most) noexcept:
    """Give idle memory back to the system, the oldest first, until at most so much is left."""
    cdef Idle *block
    while idle > most:
        block = oldest
        unlink(block)
        release(block, block.size)


cdef void *mapped(size_t size) noexcept:
    """Fresh memory that begins at a huge page; NULL if there is none."""
    cdef char *memory
    cdef size_t before
    if size > SIZE_MAX - HUGE:
        return NULL
    memory = <char *>mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == <char *>MAP_FAILED:
        return NULL
    before = (HUGE - <size_t>memory % HUGE) % HUGE
    if before:
        munmap(memory, before)
    munmap(memory + before + size, HUGE - before)
    cconv_want_huge_pages(memory + before, size, True)
    return memory + before


cdef void *fresh(size_t size) noexcept:
    cdef void *memory = NULL
    if size >= HUGE:
        return mapped(size)
    return memory if posix_memalign(&memory, LINE, size) == 0 else NULL


cdef void *take(size_t nbytes, size_t *taken) except NULL:
    """Memory for so many bytes, and how many it has. What was given back last comes first: it may be in a cache."""
    cdef void *memory
    cdef int shelf
    taken[0] = LINE if nbytes < LINE else nbytes
    if LEAST <= nbytes <= SIZE_MAX // 2:
        shelf = shelf_of(nbytes, taken)
        memory = tops[shelf]
        if memory != NULL:
            unlink(<Idle *>memory)
            return memory
    memory = fresh(taken[0])
    if memory == NULL:
        shrink(0)
        memory = fresh(taken[0])
    if memory == NULL:
        raise MemoryError(f"could not allocate {nbytes} bytes")
    return memory


cdef void give(void *memory, size_t size) noexcept:
    global newest, oldest, idle
    cdef Idle *block = <Idle *>memory
    cdef int shelf
    if size < LEAST or size > limit:
        release(memory, size)
        return
    shelf = shelf_of(size, &block.size)
    block.older, block.newer = newest, NULL
    if newest != NULL:
        newest.newer = block
    else:
        oldest = block
    newest = block
    block.above, block.below = NULL, tops[shelf]
    if tops[shelf] != NULL:
        tops[shelf].above = block
    tops[shelf] = block
    idle += size
    shrink(limit)


@cython.final
@cython.freelist(64)
cdef class Buffer:
    """Memory that begins at a cache line. It is not cleared: what was there before is there still."""

    def __cinit__(self, size_t nbytes):
        self.data = <char *>take(nbytes, &self.taken)
        self.nbytes = nbytes

    def __dealloc__(self):
        if self.data != NULL and self.taken:  # `owner` says nothing any more once the collector of cycles was here
            give(self.data, self.taken)


cdef Buffer lease(double nbytes):
    """A Buffer of a size that may be beyond every memory."""
    if nbytes > MOST_BYTES:
        raise MemoryError(f"could not allocate {nbytes:.0f} bytes")
    return Buffer(<size_t>nbytes)


cdef Buffer workspace(double nbytes):
    """The same for what run after run uses: whole huge pages from one on, as small ones behind them would be many."""
    return lease(ceil(nbytes / HUGE) * HUGE if nbytes > HUGE else nbytes)


cdef Buffer lying(owner, char *data, size_t nbytes):
    """Memory of another, which is kept."""
    cdef Buffer buffer = Buffer(0)
    give(buffer.data, buffer.taken)
    buffer.data, buffer.taken, buffer.nbytes, buffer.owner = data, 0, nbytes, owner
    return buffer


cdef Buffer borrow(cnp.ndarray array):
    """The memory of a C-ordered array, which is kept."""
    return lying(array, <char *>cnp.PyArray_DATA(array), array.nbytes)


@cython.final
cdef class Room:
    """Memory for what lives together and is written once, such as the packed weights of a network: pieces of one
    Buffer, taken with the first of them; `nbytes` is of all pieces, as whole cache lines. Its pages are small until it
    is full, since a first answer waits for them, and a host may take as long for a huge one as for a thousand that were
    free for a moment only (measured: docs/kernels.md); `full` lets the system join them later."""

    def __cinit__(self, size_t nbytes):
        self.nbytes = nbytes

    cdef Buffer take(self, size_t nbytes):
        """A piece, or a Buffer of its own once the room is full."""
        cdef size_t begin = self.used
        if self.whole is None:
            self.whole = Buffer(self.nbytes)
            self.want_huge_pages(False)
        if nbytes > self.nbytes - begin:
            return Buffer(nbytes)
        self.used += min(self.nbytes - begin, (nbytes + LINE - 1) // LINE * LINE)
        return lying(self.whole, self.whole.data + begin, nbytes)

    cdef void full(self) noexcept:
        """All pieces are written, or will not be: the memory may serve others."""
        if self.whole is not None:
            self.want_huge_pages(True)

    cdef void want_huge_pages(self, bint now) noexcept:
        if self.whole.taken >= HUGE:
            cconv_want_huge_pages(self.whole.data, self.whole.taken, now)


cdef cnp.ndarray part(Buffer memory, size_t begin, int rank, const cnp.npy_intp *shape, int type_number):
    """A C-ordered array that lies in a Buffer, from byte `begin` on, and keeps it."""
    cdef cnp.ndarray array = cnp.PyArray_SimpleNewFromData(
        rank, <cnp.npy_intp *>shape, type_number, memory.data + begin)
    Py_INCREF(memory)  # PyArray_SetBaseObject takes a reference
    cnp.PyArray_SetBaseObject(array, memory)
    return array


cdef cnp.ndarray empty(int rank, const cnp.npy_intp *shape, int type_number):
    """A C-ordered array for a result; its numbers are whatever was there."""
    cdef double nbytes = 8 if type_number == cnp.NPY_FLOAT64 else 4
    cdef int i
    for i in range(rank):
        nbytes *= shape[i]
    if nbytes < LEAST:
        return cnp.PyArray_SimpleNew(rank, <cnp.npy_intp *>shape, type_number)
    return part(lease(nbytes), 0, rank, shape, type_number)


def keep_idle(size_t most):
    """Keep at most so many bytes idle from now on."""
    global limit
    limit = most
    shrink(limit)


def drop_idle():
    """Give everything idle back to the system."""
    shrink(0)


def idle_bytes():
    """Bytes that lie idle now."""
    return idle
