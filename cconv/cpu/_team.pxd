# Team: the threads of the process (see _team.pyx), for cimport.

ctypedef void (*Task)(const void *job, long index, char *scratch) noexcept nogil
ctypedef bint (*Ask)(void *asked) noexcept nogil

cdef struct Phase:
    Task task
    const void *job
    long tasks  # the first that is none
    char *scratch
    size_t scratch_size  # of a thread
    long asks  # whether the caller asks first if the rest is still wanted
    char apart[64 - 6 * 8]  # what every thread writes has a cache line of its own
    long next  # the first that no helper has; at the beginning, the first of all
    long behind  # those that the caller has taken, from the last one back
    long left  # those that nobody has
    long done  # tasks done, and those before the first; before it is posted, as `next`
    char apart_too[64 - 4 * 8]

cdef extern from * nogil:
    """
    static inline int cconv_load(int *at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
    static inline int cconv_swap(int *at, int value) { return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST); }
    """
    int load "cconv_load"(int *at)
    int swap "cconv_swap"(int *at, int value)

cdef int threads_for(double work) noexcept
cdef void share(Phase *phases, long count, int threads, Ask ask, void *asked) noexcept nogil
