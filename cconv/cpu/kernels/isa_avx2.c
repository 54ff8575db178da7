/* AVX2 and FMA: 16 registers = 6 x 2 sums + 2 of weights + 1 broadcast, or 4 x 3 + 3 + 1. */
#define ISA avx2
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define EACH_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6)
#define WIDE_ROWS 4
#define EACH_WIDE_ROWS(X) X(1) X(2) X(3) X(4)
#define EACH_PIXELS(X) \
    X(1, 6) X(2, 6) X(3, 4) X(4, 3) X(5, 2) X(6, 2) X(7, 1) X(8, 1) X(9, 1) X(10, 1) X(11, 1) X(12, 1)
#include "isa.inc.c"
