# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Core: what the compiled steps are made with: instruction sets, tables of ints, an activation as C has it; and what a
program runs: the phases of its kernels.

In: an ISA's name, a dtype, a spec's parts; tasks.  Out: tables of kernels, C tables; tasks done.
Memory is in _pool.pyx, threads are in _team.pyx; _core.pxd passes both on.
"""

cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t
from libc.string cimport memcpy

from ._pool cimport HUGE, LINE, Buffer, part
from ._team cimport Ask, Phase, Task, load, share, swap
from .kernels cimport cconv_finish, cconv_isa, cconv_kernels, cconv_list, cconv_select

from ..errors import Cancelled
from ..planning import ACTIVATIONS

cnp.import_array()

#: Name -> value of enum cconv_activation.
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS, start=1)}


def instruction_sets():
    """(name, whether this processor runs it, vector bytes, tile rows, tile vectors, wide vectors, kept, widest) of this
    build, best first."""
    cdef int usable = 0, i = 0
    cdef const cconv_isa *isa
    found = []
    while True:
        isa = cconv_list(i, &usable)
        if isa == NULL:
            return found
        found.append((isa.name.decode(), bool(usable), isa.vector_bytes, isa.f32.rows, isa.f32.vectors,
                      isa.f32.wide_vectors, isa.f32.kept,
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
    how.past = 0
    how.alpha = 0 if activation is None else activation.alpha
    return how


cdef const int32_t *int_table(list owners, values) except NULL:
    """A C copy of a sequence of ints, owned by a Buffer that joins `owners`."""
    cdef Buffer buffer = Buffer(len(values) * sizeof(int32_t))
    cdef int32_t *table = <int32_t *>buffer.data
    cdef Py_ssize_t i
    for i, value in enumerate(values):
        table[i] = value
    owners.append(buffer)
    return table


@cython.final
cdef class CancelFlag:
    """Calls off the runs that it was given to. They look at it between two steps, without the GIL.

    Any thread may set it, at any time; it stays set until it is cleared.
    """
    cdef int value

    def set(self):
        """Runs that have it end before their next step; those that begin with it, before their first."""
        swap(&self.value, 1)

    def clear(self):
        """It may be given to other runs."""
        swap(&self.value, 0)

    def is_set(self):
        """Whether it is set."""
        return load(&self.value) != 0


cdef struct Look:
    int *flag
    bint answer


cdef bint look(void *at) noexcept nogil:
    cdef Look *asked = <Look *>at
    asked.answer = load(asked.flag) != 0
    return asked.answer


@cython.final
cdef class Question:
    """Whether a run was cancelled, asked of any other object: with the GIL, for which a run may have to wait."""
    cdef object cancel
    cdef bint answer
    cdef object error


cdef bint ask(void *question) noexcept with gil:
    cdef Question asked = <Question>question
    try:
        asked.answer = asked.cancel.is_set()
    except BaseException as error:
        asked.answer, asked.error = True, error
    return asked.answer


if FEW_BYTES < LINE + FEW * (sizeof(Phase) + JOB):
    raise ImportError("FEW_BYTES is too small")


@cython.final
@cython.freelist(16)
cdef class Phases:
    """The phases of a run, and the jobs of their tasks."""

    def __cinit__(self, long steps):
        cdef Buffer phases, jobs
        if steps == 1:
            self.phases, self.room = <Phase *>(self.few + (LINE - <size_t>self.few % LINE) % LINE), FEW
            self.jobs, self.jobs_size = <char *>(self.phases + FEW), FEW * JOB
            return
        phases, jobs = Buffer(max(1, steps) * sizeof(Phase)), Buffer(max(1, steps) * JOB)
        self.phases, self.room = <Phase *>phases.data, max(1, steps)
        self.jobs, self.jobs_size = jobs.data, jobs.nbytes
        self.buffers = [phases, jobs]

    cdef void begin_step(self) noexcept:
        """What is added next is a step of its own, before which a run may be cancelled."""
        self.begins = True

    cdef const void *keep(self, const void *job, size_t nbytes) except NULL:
        """A copy of a job that lives as long as the phases."""
        cdef Buffer more
        cdef char *at
        if self.used + nbytes > self.jobs_size:
            more = Buffer(max(nbytes, self.jobs_size))
            self.hold(more)
            self.jobs, self.jobs_size, self.used = more.data, more.nbytes, 0
        at = self.jobs + self.used
        memcpy(at, job, nbytes)
        self.used += lines(nbytes)
        return at

    cdef int hold(self, Buffer buffer) except -1:
        if self.buffers is None:
            self.buffers = []
        self.buffers.append(buffer)
        return 0

    cdef int add(self, Task task, const void *job, long begin, long end, char *scratch, size_t scratch_size) except -1:
        """Tasks begin .. end-1 of a kept job, after all that were added before are done."""
        cdef Buffer larger
        cdef Phase *phase
        if self.count == self.room:
            larger = Buffer(2 * self.room * sizeof(Phase))
            memcpy(larger.data, self.phases, self.room * sizeof(Phase))
            self.hold(larger)
            self.phases, self.room = <Phase *>larger.data, 2 * self.room
        phase = self.phases + self.count
        phase.task, phase.job, phase.tasks, phase.scratch, phase.scratch_size = task, job, end, scratch, scratch_size
        phase.next = phase.done = begin
        phase.asks, self.begins = self.begins, False
        self.count += 1
        return 0

    cdef int run(self, int threads, cancel) except -1:
        """All of them, without the GIL; or with it, by the caller alone, if `threads` is 0 (see threads_for). Cancelled
        if `cancel`, unless it is None, is set before a step."""
        cdef Question question
        cdef Look flag
        if cancel is None:
            self.share(threads, NULL, NULL)
            return 0
        if isinstance(cancel, CancelFlag):
            flag.flag, flag.answer = &(<CancelFlag>cancel).value, False
            self.share(threads, look, &flag)
        else:
            question = Question()
            question.cancel = cancel
            self.share(max(threads, 1), ask, <void *>question)
            if question.error is not None:
                raise question.error
            flag.answer = question.answer
        if flag.answer:
            raise Cancelled("the run was cancelled before it ended")
        return 0

    cdef void share(self, int threads, Ask ask, void *asked) noexcept:
        if threads == 0:
            share(self.phases, self.count, 1, ask, asked)
            return
        with nogil:
            share(self.phases, self.count, threads, ask, asked)


cdef class Kernel:
    """A spec compiled for one ISA: tables, no weights. Any number of threads may use it."""

    cpdef size_t scratch_bytes(self, long images, int threads):
        """Bytes of scratch that a run needs."""
        return 0

    cpdef size_t packed_bytes(self):
        """Bytes that `pack`, where a kernel has it, takes for packed weights."""
        return 0

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """Add the phases of a run. Every kernel has its own; cdef classes know no abstract methods, so this raises."""
        raise NotImplementedError(type(self).__name__)


cdef void share_tasks(Task task, const void *job, long tasks, int threads) noexcept nogil:
    """Tasks without scratch."""
    cdef Phase phase
    phase.task, phase.job, phase.tasks, phase.scratch, phase.scratch_size = task, job, tasks, NULL, 0
    phase.next = phase.done = phase.asks = 0
    share(&phase, 1, threads, NULL, NULL)


cdef enum:
    SCALED = 1 << 14  # numbers that make a task


cdef struct Scaling:
    const char *weight
    const double *factors
    float *scaled
    long outputs, depth, run  # run: outputs of a task


cdef void scale_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """Some outputs' weights."""
    cdef const Scaling *job = <const Scaling *>untyped
    cdef long k, i
    cdef float *row
    for k in range(index * job.run, min((index + 1) * job.run, job.outputs)):
        row = job.scaled + k * job.depth
        memcpy(row, job.weight + k * job.depth * sizeof(float), job.depth * sizeof(float))  # they may lie at any byte
        for i in range(job.depth):
            row[i] = <float>(row[i] * job.factors[k])


def scaled(cnp.ndarray weight not None, cnp.ndarray factors not None, int threads):
    """A float32 weight (K, ...), every output's numbers times a factor, a float64 of (K,), and rounded once."""
    cdef Scaling job
    cdef cnp.ndarray given = cnp.PyArray_GETCONTIGUOUS(weight), result
    if given.descr.type_num != cnp.NPY_FLOAT32 or factors.descr.type_num != cnp.NPY_FLOAT64:
        raise TypeError(f"expected float32 and float64, got {weight.dtype} and {factors.dtype}")
    if factors.ndim != 1 or not factors.flags.c_contiguous or factors.shape[0] != given.shape[0]:
        raise ValueError(f"expected {given.shape[0]} factors in a row, got shape {(<object>factors).shape}")
    # No less than a huge page, which then serves layer after layer.
    result = part(Buffer(max(HUGE, given.nbytes)), 0, given.ndim, given.shape, cnp.NPY_FLOAT32)
    job.weight, job.factors, job.scaled = data_of(given), <const double *>data_of(factors), <float *>data_of(result)
    job.outputs, job.depth = given.shape[0], given.size // given.shape[0]
    job.run = ceil_div(SCALED, job.depth)
    with nogil:
        share_tasks(scale_task, &job, ceil_div(job.outputs, job.run), threads)
    return result
