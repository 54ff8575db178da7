# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Tensors: the loops of the steps that are neither convolution, pool nor activation (planning/tensors.py).

In: their specs; C-ordered images that the caller has checked.  Out: numbers in y.
Moves copy elements and are here whole; the arithmetic of the others is in kernels/tensors.inc.c.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ._core cimport Buffer, Call, Kernel, Phases, ceil_div, int_table, kernels_of, lines
from .kernels cimport (
    CCONV_DIV_INTO, CCONV_PRELU_OF, CCONV_SUB_FROM, cconv_kernels, cconv_lrn, cconv_resize,
)

from math import prod

from ..planning import tensors

cdef enum:
    RUN = 1 << 14  # elements of a task
    MOST_LOOPS = 8

#: Kind -> value of enum cconv_arithmetic or cconv_function.
_ARITHMETIC_CODES = {kind: code for code, kind in enumerate(tensors.ARITHMETIC)}
_SWAPPED_CODES = {"sub": CCONV_SUB_FROM, "div": CCONV_DIV_INTO, "prelu": CCONV_PRELU_OF}
_FUNCTION_CODES = {kind: code for code, kind in enumerate(tensors.FUNCTIONS)}


cdef const double *double_table(list owners, values) except NULL:
    """A C copy of a sequence of numbers, owned by a Buffer that joins `owners`."""
    cdef Buffer buffer = Buffer(max(1, len(values)) * sizeof(double))
    cdef double *table = <double *>buffer.data
    cdef Py_ssize_t i
    for i, value in enumerate(values):
        table[i] = value
    owners.append(buffer)
    return table


cdef struct Loop:
    long count, source, target
    const int32_t *table

cdef struct Nest:
    int loops
    Loop loop[MOST_LOOPS]
    long rows, rows_per_task, tasks  # of one image; a row is the innermost loop


cdef void set_rows(Nest *nest) noexcept:
    cdef int i
    nest.rows = 1
    for i in range(nest.loops - 1):
        nest.rows *= nest.loop[i].count
    nest.rows_per_task = max(1, <long>RUN // nest.loop[nest.loops - 1].count)
    nest.tasks = ceil_div(nest.rows, nest.rows_per_task)


cdef void locate(const Nest *nest, long row, long *index, long *source, long *target) noexcept nogil:
    """The place of a row in the outer loops, and what they add to the two offsets."""
    cdef int i
    cdef const Loop *loop
    for i in range(nest.loops - 2, -1, -1):
        loop = &nest.loop[i]
        index[i] = row % loop.count
        row = row // loop.count
        source[0] += loop.table[index[i]] if loop.table != NULL else index[i] * loop.source
        target[0] += index[i] * loop.target


cdef struct Move:
    Nest nest
    long begin, at, source, target
    long count  # elements of y
    int itemsize, filled
    double fill
    const char *x
    char *y


cdef void move_row(const Loop *loop, const char *x, char *y, int itemsize) noexcept nogil:
    cdef long i
    cdef long step = loop.source, to = loop.target
    if loop.table == NULL and step == 1 and to == 1:
        memcpy(y, x, loop.count * itemsize)
    elif loop.table != NULL and itemsize == 4:
        for i in range(loop.count):
            (<uint32_t *>y)[i * to] = (<const uint32_t *>x)[loop.table[i]]
    elif loop.table != NULL:
        for i in range(loop.count):
            (<uint64_t *>y)[i * to] = (<const uint64_t *>x)[loop.table[i]]
    elif itemsize == 4:
        for i in range(loop.count):
            (<uint32_t *>y)[i * to] = (<const uint32_t *>x)[i * step]
    else:
        for i in range(loop.count):
            (<uint64_t *>y)[i * to] = (<const uint64_t *>x)[i * step]


cdef void fill_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One run of neighbouring elements of y."""
    cdef const Move *job = <const Move *>untyped
    cdef long i
    for i in range(index * RUN, min(job.count, (index + 1) * RUN)):
        if job.itemsize == 4:
            (<float *>job.y)[i] = <float>job.fill
        else:
            (<double *>job.y)[i] = job.fill


cdef void move_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """Some rows of one image."""
    cdef const Move *job = <const Move *>untyped
    cdef const Nest *nest = &job.nest
    cdef long image = index // nest.tasks, row = index % nest.tasks * nest.rows_per_task
    cdef long last = min(nest.rows, row + nest.rows_per_task)
    cdef long place[MOST_LOOPS]
    cdef long source, target
    while row < last:
        source, target = image * job.source + job.begin, image * job.target + job.at
        locate(nest, row, place, &source, &target)
        move_row(&nest.loop[nest.loops - 1], job.x + source * job.itemsize, job.y + target * job.itemsize, job.itemsize)
        row += 1


cdef class Moving(Kernel):
    """A MoveSpec."""

    cdef Move job
    cdef list owners

    def __init__(self, spec, str isa):
        cdef int i
        cdef Loop *loop
        self.owners = []
        self.job.filled, self.job.fill = spec.fill is not None, spec.fill or 0
        self.job.begin, self.job.at, self.job.source, self.job.target = spec.begin, spec.at, spec.source, spec.target
        self.job.itemsize = 4 if spec.dtype == "float32" else 8
        if len(spec.axes) > MOST_LOOPS:
            raise ValueError(f"expected at most {MOST_LOOPS} loops, got {len(spec.axes)}")
        self.job.nest.loops = len(spec.axes)
        for i, axis in enumerate(spec.axes):
            loop = &self.job.nest.loop[i]
            loop.count, loop.source, loop.target = axis.count, axis.source, axis.target
            loop.table = NULL
            if axis.table is not None:
                loop.table = int_table(self.owners, axis.table)
        set_rows(&self.job.nest)

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """The places of y that the spec says; what others have written there stays."""
        cdef Move job = self.job
        cdef const void *kept
        job.x, job.y, job.count = call.x, call.y, call.images * job.target
        kept = phases.keep(&job, sizeof(job))
        if job.filled:
            phases.add(fill_task, kept, 0, ceil_div(job.count, RUN), NULL, 0)
        return phases.add(move_task, kept, 0, call.images * job.nest.tasks, NULL, 0)


cdef struct Rows:
    const cconv_kernels *kernels
    int kind
    Nest nest
    size_t itemsize
    long x_size, other_size, y_size  # per image; other_size 0: all images share one
    const char *x
    const char *other
    char *y


cdef void arithmetic_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """Some rows of one image. The loops' `target` is here the other operand's."""
    cdef const Rows *job = <const Rows *>untyped
    cdef const Nest *nest = &job.nest
    cdef const Loop *inner = &nest.loop[nest.loops - 1]
    cdef long image = index // nest.tasks, row = index % nest.tasks * nest.rows_per_task
    cdef long last = min(nest.rows, row + nest.rows_per_task)
    cdef long place[MOST_LOOPS]
    cdef long x, other
    while row < last:
        x, other = image * job.x_size, image * job.other_size
        locate(nest, row, place, &x, &other)
        job.kernels.arithmetic(
            job.kind, inner.count, job.x + x * job.itemsize, inner.source, job.other + other * job.itemsize,
            inner.target, job.y + (image * job.y_size + row * inner.count) * job.itemsize)
        row += 1


cdef class Arithmetic(Kernel):
    """An ArithmeticSpec for one ISA; what follows it in y, an activation, is a step of its own."""

    cdef Rows job

    def __init__(self, spec, str isa):
        cdef Rows *job = &self.job
        cdef int i
        if len(spec.loops) > MOST_LOOPS or spec.activation is not None:
            raise ValueError(f"expected at most {MOST_LOOPS} loops and no activation, got {spec}")
        job.kernels = kernels_of(isa, spec.dtype)
        job.kind = _SWAPPED_CODES.get(spec.kind, _ARITHMETIC_CODES[spec.kind]) if spec.swapped else (
            _ARITHMETIC_CODES[spec.kind])
        job.itemsize = 4 if spec.dtype == "float32" else 8
        job.x_size, job.other_size = spec.x_size, 0 if spec.constant else spec.other_size
        job.y_size = spec.output[2]
        job.nest.loops = len(spec.loops)
        for i, loop in enumerate(spec.loops):
            job.nest.loop[i].count, job.nest.loop[i].table = loop.count, NULL
            job.nest.loop[i].source, job.nest.loop[i].target = loop.x, loop.other
        set_rows(&job.nest)

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = x <kind> second, or x <kind> weights."""
        cdef Rows job = self.job
        job.x, job.other, job.y = call.x, call.weights if call.second == NULL else call.second, call.y
        return phases.add(arithmetic_task, phases.keep(&job, sizeof(job)), 0, call.images * job.nest.tasks, NULL, 0)


cdef struct Elements:
    const cconv_kernels *kernels
    int kind
    const double *parameters
    long count
    size_t itemsize
    const char *x
    char *y


cdef void function_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One run of neighbouring elements."""
    cdef const Elements *job = <const Elements *>untyped
    cdef size_t at = index * RUN * job.itemsize
    job.kernels.function(job.kind, job.parameters, min(<long>RUN, job.count - index * RUN), job.x + at, job.y + at)


cdef class Function(Kernel):
    """A FunctionSpec for one ISA."""

    cdef Elements job
    cdef list owners
    cdef long size  # elements of an image

    def __init__(self, spec, str isa):
        self.owners = []
        self.size = prod(spec.image)
        self.job.kernels = kernels_of(isa, spec.dtype)
        self.job.kind = _FUNCTION_CODES[spec.kind]
        self.job.parameters = double_table(self.owners, spec.parameters)
        self.job.itemsize = 4 if spec.dtype == "float32" else 8

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = function(x)."""
        cdef Elements job = self.job
        job.count = call.images * self.size
        job.x, job.y = call.x, call.y
        return phases.add(function_task, phases.keep(&job, sizeof(job)), 0, ceil_div(job.count, RUN), NULL, 0)


cdef struct Maps:
    const cconv_kernels *kernels
    cconv_lrn lrn
    cconv_resize resize
    long channels, inner
    size_t image_bytes, in_bytes, out_bytes
    const char *x
    char *y


cdef void softmax_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One image."""
    cdef const Maps *job = <const Maps *>untyped
    job.kernels.softmax(job.channels, job.inner, job.x + index * job.in_bytes, scratch, job.y + index * job.out_bytes)


cdef void lrn_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One channel of one image."""
    cdef const Maps *job = <const Maps *>untyped
    cdef size_t at = index // job.channels * job.image_bytes
    job.kernels.lrn(&job.lrn, index % job.channels, job.x + at, job.y + at)


cdef void resize_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One map."""
    cdef const Maps *job = <const Maps *>untyped
    job.kernels.resize(&job.resize, job.x + index * job.in_bytes, scratch, job.y + index * job.out_bytes)


cdef class Mapping(Kernel):
    """What softmax, LRN and resizing share: an image or a map is a task."""

    cdef Maps job
    cdef list owners
    cdef size_t scratch_size

    cpdef size_t scratch_bytes(self, long images, int threads):
        return self.scratch_size * threads


cdef class Softmax(Mapping):
    """A SoftmaxSpec for one ISA."""

    def __init__(self, spec, str isa):
        cdef size_t itemsize = 4 if spec.dtype == "float32" else 8
        self.job.kernels = kernels_of(isa, spec.dtype)
        self.job.channels, self.job.inner = spec.C, spec.inner
        self.job.in_bytes = self.job.out_bytes = spec.C * spec.inner * itemsize
        self.scratch_size = lines(2 * spec.inner * itemsize)

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = softmax(x) over the channels."""
        cdef Maps job = self.job
        job.x, job.y = call.x, call.y
        return phases.add(softmax_task, phases.keep(&job, sizeof(job)), 0, call.images, call.scratch, self.scratch_size)


cdef class Lrn(Mapping):
    """An LrnSpec for one ISA."""

    def __init__(self, spec, str isa):
        cdef cconv_lrn *how = &self.job.lrn
        self.job.kernels = kernels_of(isa, spec.dtype)
        how.channels, how.inner, how.size = spec.C, spec.inner, spec.size
        how.alpha, how.beta, how.bias = spec.alpha, spec.beta, spec.bias
        self.job.channels = spec.C
        self.job.image_bytes = spec.C * spec.inner * (4 if spec.dtype == "float32" else 8)
        self.scratch_size = 0

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = lrn(x)."""
        cdef Maps job = self.job
        job.x, job.y = call.x, call.y
        return phases.add(lrn_task, phases.keep(&job, sizeof(job)), 0, call.images * job.channels, NULL, 0)


cdef class Resizing(Mapping):
    """A ResizeSpec for one ISA."""

    def __init__(self, spec, str isa):
        cdef cconv_resize *how = &self.job.resize
        cdef size_t itemsize = 4 if spec.dtype == "float32" else 8
        rows, columns = spec.rows, spec.columns
        self.owners = []
        self.job.kernels = kernels_of(isa, spec.dtype)
        self.job.channels = spec.C
        how.width, how.outputs_high, how.outputs_wide = spec.W, len(rows.low), len(columns.low)
        how.row_low, how.row_high = int_table(self.owners, rows.low), int_table(self.owners, rows.high)
        how.column_low, how.column_high = int_table(self.owners, columns.low), int_table(self.owners, columns.high)
        how.row_weight = double_table(self.owners, rows.weight)
        how.column_weight = double_table(self.owners, columns.weight)
        self.job.in_bytes = spec.H * spec.W * itemsize
        self.job.out_bytes = how.outputs_high * how.outputs_wide * itemsize
        self.scratch_size = lines(spec.W * itemsize)

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = resize(x)."""
        cdef Maps job = self.job
        job.x, job.y = call.x, call.y
        return phases.add(
            resize_task, phases.keep(&job, sizeof(job)), 0, call.images * job.channels, call.scratch, self.scratch_size)


cdef void matmul_task(const void *untyped, long index, char *scratch) noexcept nogil:
    """One row of one product."""
    cdef const Rows *job = <const Rows *>untyped
    cdef const Loop *matrix = &job.nest.loop[job.nest.loops - 1]  # M, K, N
    cdef long m = index % matrix.count, which = index // matrix.count
    cdef long image = which // job.nest.rows
    cdef long place[MOST_LOOPS]
    cdef long x = 0, other = 0
    locate(&job.nest, which % job.nest.rows, place, &x, &other)
    x = image * job.x_size + x * matrix.count * matrix.source + m * matrix.source
    other = image * job.other_size + other * matrix.source * matrix.target
    job.kernels.matmul_row(matrix.source, matrix.target, job.x + x * job.itemsize, job.other + other * job.itemsize,
                           job.y + index * matrix.target * job.itemsize)


cdef class MatMul(Kernel):
    """A MatMulSpec for one ISA."""

    cdef Rows job

    def __init__(self, spec, str isa):
        cdef Rows *job = &self.job
        cdef int i, loops = len(spec.batch)
        if loops >= MOST_LOOPS:
            raise ValueError(f"expected fewer than {MOST_LOOPS} loops, got {loops}")
        job.kernels = kernels_of(isa, spec.dtype)
        job.itemsize = 4 if spec.dtype == "float32" else 8
        job.x_size, job.other_size = spec.x_size, 0 if spec.constant else spec.other_size
        for i, loop in enumerate(spec.batch):
            job.nest.loop[i].count, job.nest.loop[i].table = loop.count, NULL
            job.nest.loop[i].source, job.nest.loop[i].target = loop.x, loop.other
        job.nest.loops = loops + 1
        job.nest.loop[loops].count, job.nest.loop[loops].source, job.nest.loop[loops].target = spec.M, spec.K, spec.N
        set_rows(&job.nest)

    cdef int enter(self, Phases phases, const Call *call) except -1:
        """y = x @ second, or x @ weights."""
        cdef Rows job = self.job
        job.x, job.other, job.y = call.x, call.weights if call.second == NULL else call.second, call.y
        return phases.add(
            matmul_task, phases.keep(&job, sizeof(job)), 0,
            call.images * job.nest.rows * job.nest.loop[job.nest.loops - 1].count, NULL, 0)
