# Team: the threads of the process (see _team.pyx), for cimport.

ctypedef void (*Task)(const void *job, long index, char *scratch) noexcept nogil

cdef int threads_for(double work) noexcept
cdef void share(Task task, const void *job, long tasks, char *scratch, size_t scratch_size, int threads) noexcept nogil
