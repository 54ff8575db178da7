# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Program: a plan's steps in order, on N images: where each reads and writes, with how much scratch, by how many threads.

In: a Plan and its Steps (program.py makes them), packed weights; then images.  Out: maps.
A call of a small layer takes microseconds, so this is compiled; the arithmetic is in the kernels of the steps.
"""

cimport cython
cimport numpy as cnp

from ._core cimport Buffer
from ._pool cimport empty, lease, part
from ._team cimport threads_for

from math import prod

from ..errors import Cancelled

cnp.import_array()

cdef Buffer NOTHING = Buffer(0)


@cython.final
cdef class Step:
    """An operation on numbered values and the kernel that computes it.

    `kernel` has scratch_bytes(images, threads) and run(x, weights, bias, second, y, threads, scratch); `reads(x)` says
    whether it can read an x whose rows do not follow each other; `pack(weights)` gives its (packed weights, bias).
    A run of the plan has `times` images of the kernel, (C, H, W) `image` in and `output` out. `moot` steps have nothing
    to do in a run alone."""

    cdef object kernel, reads, pack
    cdef int x, second, y
    cdef Py_ssize_t times
    cdef cnp.npy_intp image[3]
    cdef cnp.npy_intp shape[4]
    cdef Py_ssize_t begin, begin_alone  # in the arena, in elements for each run; -1 if the value does not lie there
    cdef bint moot

    def __init__(self, kernel, reads, pack, tuple inputs, int value, tuple image, tuple output, times, begins, moot):
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

    def __init__(self, plan, list steps, double work):
        self.plan, self.steps, self.work = plan, steps, work
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

    cdef cnp.ndarray place(self, Step step, Py_ssize_t runs, Buffer arena, given):
        """Where a step writes: its place in the arena, an array that was given, or a new one."""
        cdef cnp.npy_intp shape[4]
        cdef Py_ssize_t begin = step.begin_alone if runs == 1 else step.begin
        if given is not None and cnp.PyArray_ISCARRAY(given):
            return given
        shape[0], shape[1], shape[2], shape[3] = runs * step.times, step.shape[1], step.shape[2], step.shape[3]
        if begin < 0:
            return empty(4, shape, self.type_number)
        return part(arena, begin * runs * self.itemsize, 4, shape, self.type_number)


@cython.final
cdef class Program:
    """A plan with packed weights. Safe to call from several threads at once."""

    cdef readonly Geometry geometry
    cdef list packed

    def __init__(self, Geometry geometry not None, weights):
        cdef Step step
        self.geometry = geometry
        self.packed = [(None, None) if step.pack is None else step.pack(weights) for step in geometry.steps]

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
        cancel : object with is_set(), optional
            Asked before every step.

        Returns
        -------
        The outputs, in the order of the plan.

        Raises
        ------
        Cancelled
            `cancel` was set; given outputs may have been written in part.
        """
        cdef Geometry geometry = self.geometry
        cdef list values = geometry.table(geometry.inputs, inputs)
        cdef list given = None if outputs is None else geometry.table(geometry.outputs, outputs)
        cdef Py_ssize_t runs = cnp.PyArray_SIZE(values[geometry.first]) // geometry.input_size, i
        cdef int threads = threads_for(geometry.work * runs)
        cdef Buffer scratch = NOTHING, arena = None
        cdef size_t nbytes = 0
        cdef Step step
        for step in geometry.steps:
            nbytes = max(nbytes, <size_t>step.kernel.scratch_bytes(runs * step.times, max(threads, 1)))
        if nbytes:
            scratch = Buffer(nbytes)
        cdef double elements = geometry.arena_alone if runs == 1 else geometry.arena
        if elements:
            arena = lease(elements * runs * geometry.itemsize)
        for i in range(len(geometry.steps)):
            if cancel is not None and cancel.is_set():
                raise Cancelled("the run was cancelled before it ended")
            step = geometry.steps[i]
            if step.moot and runs == 1:
                values[step.y] = geometry.place(step, runs, arena, None) if values[step.y] is None else values[step.y]
                continue
            weights, bias = <tuple>self.packed[i]
            second = None if step.second < 0 else values[step.second]
            if second is not None and not cnp.PyArray_ISCARRAY_RO(second):
                second = second.copy(order="C")
            y = values[step.y]  # there already if it is written in parts
            if y is None:
                y = geometry.place(step, runs, arena, None if given is None else given[step.y])
            step.kernel.run(step.readable(values[step.x]), weights, bias, second, y, threads, scratch)
            values[step.y] = y
        if given is not None:
            for value in geometry.outputs:
                if values[value] is not given[value]:
                    given[value][...] = values[value]
                    values[value] = given[value]
        return [values[value] for value in geometry.outputs]
