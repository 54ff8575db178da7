# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Core: what the compiled steps are made with: instruction sets, tables of ints, an activation as C has it.

In: an ISA's name, a dtype, a spec's parts.  Out: tables of kernels, C tables.
Memory is in _pool.pyx, threads are in _team.pyx; _core.pxd passes both on.
"""

from libc.stdint cimport int32_t

from ._pool cimport Buffer
from .kernels cimport cconv_finish, cconv_isa, cconv_kernels, cconv_list, cconv_select

from ..planning import ACTIVATIONS

#: Name -> value of enum cconv_activation.
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS, start=1)}


def instruction_sets():
    """(name, whether this processor runs it, vector bytes, tile rows, tile vectors, wide vectors, widest) of this
    build, best first."""
    cdef int usable = 0, i = 0
    cdef const cconv_isa *isa
    found = []
    while True:
        isa = cconv_list(i, &usable)
        if isa == NULL:
            return found
        found.append((isa.name.decode(), bool(usable), isa.vector_bytes, isa.f32.rows, isa.f32.vectors,
                      isa.f32.wide_vectors, tuple(isa.f32.widest[o] for o in range(isa.f32.outputs))))
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


cdef const int32_t *int_table(list owners, values) except NULL:
    """A C copy of a sequence of ints, owned by a Buffer that joins `owners`."""
    cdef Buffer buffer = Buffer(len(values) * sizeof(int32_t))
    cdef int32_t *table = <int32_t *>buffer.data
    cdef Py_ssize_t i
    for i, value in enumerate(values):
        table[i] = value
    owners.append(buffer)
    return table
