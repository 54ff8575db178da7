# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Program: a plan's steps in order, on N images: where each reads and writes, how much scratch and how many threads.

In: a Plan and its Steps (program.py makes them), packed weights; then images.  Out: maps.
A call of a small layer takes microseconds, so this is compiled; the arithmetic is in the kernels of the steps.
"""

cimport cython
cimport numpy as cnp

from ._core cimport Buffer, Call, Kernel, Phases, Room, lines
from ._pool cimport empty, workspace
from ._team cimport threads_for

from math import prod

cnp.import_array()

cdef enum:
    FEW_VALUES = 4  # of a plan that need no memory for their places

cdef Buffer NOTHING = Buffer(0)


@cython.final
cdef class Step:
    """An operation on numbered values and the kernel that computes it.

    `reads(x)` says whether the kernel can read an x whose rows do not follow each other; `pack(weights, room)` gives
    its (packed weights, bias). A run of the plan has `times` images of the kernel, (C, H, W) `image` in and `output`
    out. `moot` steps have nothing to do in a run alone."""

    cdef Kernel kernel
    cdef object reads, pack
    cdef int x, second, y
    cdef Py_ssize_t times
    cdef cnp.npy_intp image[3]
    cdef cnp.npy_intp shape[4]
    cdef Py_ssize_t begin, begin_alone  # in the arena, in elements for each run; -1 if the value does not lie there
    cdef bint moot

    def __init__(self, Kernel kernel not None, reads, pack, tuple inputs, int value, tuple image, tuple output, times,
                 begins, moot):
        self.kernel, self.reads, self.pack = kernel, reads, pack
        self.x, self.second, self.y = inputs[0], inputs[1] if len(inputs) > 1 else -1, value
        self.image[0], self.image[1], self.image[2] = image
        self.shape[1], self.shape[2], self.shape[3] = output
        self.times, self.moot = times, moot
        self.begin, self.begin_alone = begins

    cdef cnp.ndarray readable(self, cnp.ndarray x):
        """x as images of the kernel, or a copy if it cannot read them. (An axis of one place may have any stride and
        still count as C order.)"""
        cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(x)
        if x.ndim != 4 or x.shape[1] != self.image[0] or x.shape[2] != self.image[1] or x.shape[3] != self.image[2]:
            x = x.reshape((-1, self.image[0], self.image[1], self.image[2]))
        if cnp.PyArray_ISCARRAY_RO(x) and x.strides[3] == itemsize and x.strides[2] == x.shape[3] * itemsize:
            return x
        return x if self.reads(x) else x.copy(order="C")

    cdef int read(self, list arrays, char **at, list copies, Call *call) except -1:
        """Fill in where the images are read: in arrays, which are inputs and outputs, or in the arena."""
        cdef cnp.ndarray x = arrays[self.x], second = None if self.second < 0 else arrays[self.second]
        if x is None:
            call.x, call.x_w = at[self.x], call.itemsize
            call.x_h = self.image[2] * call.x_w
            call.x_c = self.image[1] * call.x_h
            call.x_n = self.image[0] * call.x_c
        else:
            x = self.readable(x)
            if x is not arrays[self.x]:
                copies.append(x)
            call.x = <const char *>cnp.PyArray_DATA(x)
            call.x_n, call.x_c, call.x_h, call.x_w = x.strides[0], x.strides[1], x.strides[2], x.strides[3]
        if self.second < 0:
            call.second = NULL
        elif second is None:
            call.second = at[self.second]
        else:
            if not cnp.PyArray_ISCARRAY_RO(second):
                second = second.copy(order="C")
                copies.append(second)
            call.second = <const char *>cnp.PyArray_DATA(second)
        return 0


cdef struct Packed:
    const char *weights
    const char *bias


cdef char *memory_of(held) except? NULL:
    """Where packed weights, an array or nothing begin."""
    if held is None:
        return NULL
    return (<Buffer>held).data if isinstance(held, Buffer) else <char *>cnp.PyArray_DATA(held)


@cython.final
cdef class Geometry:
    """A plan compiled for its machine, without weights: the places of all values. Called with Weights, a Program."""

    cdef readonly object plan
    cdef list steps
    cdef tuple inputs, outputs
    cdef int values, first, type_number
    cdef Py_ssize_t itemsize
    cdef double arena, arena_alone, work  # for one run: elements; time, in operations of a convolution
    cdef Py_ssize_t input_size  # elements of the first input, for one run
    cdef size_t packed  # bytes of all packed weights

    def __init__(self, plan, list steps, double work):
        cdef Step step
        self.plan, self.steps, self.work = plan, steps, work
        for step in steps:
            self.packed += lines(step.kernel.packed_bytes())
        self.inputs, self.outputs = plan.inputs, plan.outputs
        self.values = 1 + max(plan.values)
        self.first = plan.inputs[0]
        self.input_size = prod(plan.values[self.first])
        self.arena, self.arena_alone = plan.arena.size, plan.alone.size
        self.type_number, self.itemsize = (cnp.NPY_FLOAT32, 4) if plan.dtype == "float32" else (cnp.NPY_FLOAT64, 8)

    def __call__(self, weights):
        return Program(self, weights)

    cdef list table(self, tuple numbers, arrays):
        """Arrays by the numbers of their values; None for the others."""
        cdef list table = [None] * self.values
        cdef Py_ssize_t i
        if len(arrays) != len(numbers):
            raise ValueError(f"expected {len(numbers)} arrays, got {len(arrays)}")
        for i in range(len(numbers)):
            table[numbers[i]] = arrays[i]
        return table

    cdef cnp.ndarray result(self, Step step, Py_ssize_t runs, given):
        """Where a step writes an output: an array that was given, or a new one."""
        cdef cnp.npy_intp shape[4]
        if given is not None and cnp.PyArray_ISCARRAY(given):
            return given
        shape[0], shape[1], shape[2], shape[3] = runs * step.times, step.shape[1], step.shape[2], step.shape[3]
        return empty(4, shape, self.type_number)


@cython.final
cdef class Program:
    """A plan with packed weights. Safe to call from several threads at once."""

    cdef readonly Geometry geometry
    cdef list packed  # kept for `memory`
    cdef Buffer memory  # of a Packed for each step

    def __init__(self, Geometry geometry not None, weights):
        cdef Step step
        cdef Packed *packed
        cdef Room room = None
        if len(geometry.steps) > 1:
            room = Room(geometry.packed)
        self.geometry = geometry
        try:
            self.packed = [(None, None) if step.pack is None else step.pack(weights, room) for step in geometry.steps]
        finally:
            if room is not None:
                room.full()
        self.memory = Buffer(len(geometry.steps) * sizeof(Packed))
        packed = <Packed *>self.memory.data
        for i, (weight, bias) in enumerate(self.packed):
            packed[<Py_ssize_t>i].weights, packed[<Py_ssize_t>i].bias = memory_of(weight), memory_of(bias)

    @property
    def plan(self):
        return self.geometry.plan

    def run(self, inputs, outputs=None, cancel=None):
        """Run on N images, or on as many runs as the first input holds.

        Parameters
        ----------
        inputs : list of (N, C, H, W) arrays, in the order and of the dtype of the plan
        outputs : list of arrays to write, optional
            Of the exact shape; may not overlap an input, except the residual of the step that writes it.
        cancel : CancelFlag, or another object with is_set(), optional
            Asked before every step; the first without the GIL.

        Returns
        -------
        The outputs, in the order of the plan.

        Raises
        ------
        Cancelled
            `cancel` was set; given outputs may have been written in part.
        """
        cdef Geometry geometry = self.geometry
        cdef list arrays = geometry.table(geometry.inputs, inputs)  # of inputs and outputs
        cdef list given = None if outputs is None else geometry.table(geometry.outputs, outputs)
        cdef Py_ssize_t runs = cnp.PyArray_SIZE(arrays[geometry.first]) // geometry.input_size, begin, count, i
        cdef int threads = threads_for(geometry.work * runs)
        cdef Buffer scratch = NOTHING, arena = NOTHING
        cdef size_t nbytes = 0
        cdef Step step
        cdef double elements = geometry.arena_alone if runs == 1 else geometry.arena
        cdef Packed *packed = <Packed *>self.memory.data
        cdef Phases phases
        cdef Call call
        cdef list copies = []  # of inputs, for as long as they are read
        cdef char *few[FEW_VALUES]
        cdef char **at = few  # the values in the arena
        cdef Buffer places
        cdef cnp.ndarray array
        count = len(geometry.steps)
        if geometry.values > FEW_VALUES:
            places = Buffer(geometry.values * sizeof(void *))
            at = <char **>places.data
        for step in geometry.steps:
            nbytes = max(nbytes, step.kernel.scratch_bytes(runs * step.times, max(threads, 1)))
        if nbytes:
            scratch = workspace(nbytes)
        if elements:
            arena = workspace(elements * runs * geometry.itemsize)
        phases = Phases(count)
        call.threads, call.scratch, call.itemsize = threads, scratch.data, geometry.itemsize
        for i in range(count):
            step = geometry.steps[i]
            begin = step.begin_alone if runs == 1 else step.begin
            at[step.y] = NULL if begin < 0 else arena.data + begin * runs * geometry.itemsize
            if step.moot and runs == 1:
                continue
            call.images = runs * step.times
            call.weights, call.bias = packed[i].weights, packed[i].bias
            step.read(arrays, at, copies, &call)
            array = arrays[step.y]  # there already if it is written in parts
            if array is None and at[step.y] == NULL:
                array = arrays[step.y] = geometry.result(step, runs, None if given is None else given[step.y])
            call.y = at[step.y] if array is None else <char *>cnp.PyArray_DATA(array)
            phases.begin_step()
            step.kernel.enter(phases, &call)
        phases.run(threads, cancel)
        if given is not None:
            for value in geometry.outputs:
                if arrays[value] is not given[value]:
                    given[value][...] = arrays[value]
                    arrays[value] = given[value]
        return [arrays[value] for value in geometry.outputs]
