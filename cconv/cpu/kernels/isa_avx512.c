/* AVX-512 F, BW, DQ, VL: 32 registers = 14 x 2 sums + 2 of weights + 1 broadcast; 14 divides 224, 112, 56, 28 and 14. */
#define ISA avx512
#define VECTOR_BYTES 64
#define TILE_ROWS 14
#define EACH_ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
#include "isa.inc.c"
